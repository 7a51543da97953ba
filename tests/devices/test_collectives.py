"""What the compiled programs send over the network, and over which axes of the mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.devices import sharding
from grpo_jax.learner import logprobs, train_state, update
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models.lora import Weights
from grpo_jax.planning import hlo
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Experience, Layer, ModelConfig, Rotary, Sampling

TOKENS = 1000.0  # how often the decode loop runs: by it what stands in the loop is known
SLOTS, LANES, LIMIT = 8, 2, 6
MODEL = dataclasses.replace(tiny.MODEL, vocab_size=2048)  # wider than any activation


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 2, 2)


@pytest.fixture(scope="module")
def decoder(mesh):
    return decode.Decoder(MODEL, mesh, Sampling(), (tiny.STOP,), LIMIT)


def in_the_loop(program, *args, mesh) -> list[hlo.Collective]:
    text = program.lower(*args).compile().as_text()
    return [c for c in hlo.cost(text, mesh, TOKENS).collectives if c.times >= TOKENS]


def refuse_weights(collectives: list[hlo.Collective], rows: int) -> None:
    """Fails where the loop sends over an axis of rows, or more than activations of a token."""
    widest = max(MODEL.width, MODEL.mlp_width)
    for c in collectives:
        assert c.axes == ("tensor",), c
        assert c.sent <= 2 * 4 * rows * widest, c


@pytest.mark.parametrize("tensor", [2, 4])
def test_decoding_sends_activations_over_tensor_and_nothing_else(tensor):
    """Four devices to two key-value heads do not share heads: attention is each row's own."""
    mesh = sharding.make_mesh(-1, 2, tensor)
    decoder = decode.Decoder(MODEL, mesh, Sampling(), (tiny.STOP,), LIMIT)
    engine = Engine(decoder, compact=False)
    params = engine.publish.like(train_state.state_like(MODEL, mesh, optax.sgd(0.1)).params)
    slots = engine.empty.eval_shape(SLOTS // engine.shards, LANES, 8)
    enough_S = np.ones(engine.shards, np.int32)
    arguments = params, np.float32(1), -1, 1, None, enough_S, slots

    found = in_the_loop(engine.decode, *arguments, mesh=mesh)

    assert len(found) >= 2 * MODEL.num_layers  # after attention and after the MLP, or round that
    assert any("/attention/" in c.where for c in found) == (tensor == 2)
    refuse_weights(found, SLOTS // sharding.num_slot_shards(mesh) * LANES)


def test_the_check_fails_on_weights_that_are_not_published(mesh, decoder):
    """Master weights, split over fsdp, and no shards of rows by hand: gathered at every token."""
    params = train_state.state_like(MODEL, mesh, optax.sgd(0.1)).params
    slots = jax.eval_shape(functools.partial(decode.empty, decoder, SLOTS, LANES, 8))

    def program(params, *args):
        layers = tiny.unstacked(params["layers"], MODEL)
        return decode.decode(decoder, params | {"layers": layers}, *args)

    with jax.set_mesh(mesh):
        args = np.float32(1), -1, 1, None, np.ones(1, np.int32), slots
        found = in_the_loop(jax.jit(program), params, *args, mesh=mesh)

    assert any("fsdp" in c.axes for c in found)
    with pytest.raises(AssertionError):
        refuse_weights(found, SLOTS * LANES)


def test_an_update_sends_what_fsdp_must(monkeypatch):
    """Of every layer, each microbatch gathers the weights twice and reduces the gradient once.

    The head is gathered once, and its gradient, made in two chunks of four tokens, reduced once.
    """
    monkeypatch.setattr(logprobs, "_MAX_TOKENS", 4)
    model = ModelConfig(
        "llama", 2048, 128, 512, (Layer(),) * 3, 4, 2, 32, (Rotary(1e4),), 1e-6, 64, False
    )
    mesh, prompts, group, tokens, width = sharding.make_mesh(1, 8, 1), 16, 2, 4, 16
    scorer = Scorer(model, mesh, Sampling(), remat="full", microbatch=8)
    optimizer = optax.sgd(0.1)
    learn = update.make_update(scorer, PolicyLoss(losses.Objective()), optimizer, num_minibatches=1)
    rollouts = tiny.rollouts(prompts, group, tokens).replace(
        prompt_PQ=np.zeros((prompts, width), np.int32),
        length_PG=np.full((prompts, group), tokens, np.int32),
    )
    experience = Experience(
        rollouts=rollouts,
        advantage=np.zeros((prompts, group), np.float32),
        action_PGC=np.ones((prompts, group, tokens), bool),
        old_logp_PGC=None,
        ref_logp_PGC=None,
    )
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=sharding.sharding_of(mesh, ("rows",) + (None,) * (x.ndim - 1), x.shape),
        ),
        experience,
    )
    microbatches = scorer.microbatches(rollouts, np.arange(prompts))
    number = microbatches.number
    assert number == 2
    params = train_state.state_like(model, mesh, optimizer).params

    args = Weights(params), number, learn.zero_gradient.eval_shape(), placed, *microbatches.arrays
    program = learn.gradient.lower(*args)
    sent = hlo.cost(program.compile().as_text(), mesh, int(number)).sent

    layers = sum(x.size for x in jax.tree.leaves(params["layers"]))
    head, embedding = params["head"]["kernel"].size, params["embed"]["embedding"].size
    ring = 4 * 7 / 8  # bytes of a float32 that a device of eight sends for an element
    must = ring * (number * (3 * layers + head + embedding) + head)
    assert {axes for _, axes in sent} == {("fsdp",)}
    # XLA for CPU reduces whole gradients and keeps a slice, which takes twice a reduce-scatter;
    # for TPU it makes one.
    halved = {kind: size / (2 if kind == "all-reduce" else 1) for (kind, _), size in sent.items()}
    assert halved["all-gather"] > 0.9 * ring * (number * 2 * layers + head)
    assert 0.9 * must < sum(halved.values()) < 1.2 * must
