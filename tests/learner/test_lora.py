"""Adapters that learn beside frozen weights, in 32, 8 or 4 bits: what moves, and by how much."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import made_once
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import keys
from grpo_jax.algorithm import losses
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.train_state import start, state_like
from grpo_jax.learner.update import make_update
from grpo_jax.models import lora
from grpo_jax.models.hf import targets
from grpo_jax.models.hf.targets import Spec
from grpo_jax.sampling.decode import Decoder
from grpo_jax.structs import Experience, ModelConfig, Sampling

PROMPTS = [[7], [5, 6, 7, 8], [30, 2], [11, 12, 13], [3, 3], [39], [9, 8, 7], [20]]
GROUP, LIMIT, RATE, STEPS = 2, 6, 2.0, 5
SGD = optax.sgd(1.0)
RANKS = {"layers.1.mlp.down_proj": 2}  # of another rank than the first layer's


def adapted(*, base: str = "auto", model: ModelConfig = tiny.MODEL, **spec) -> ModelConfig:
    spec = Spec(**{"rank": 4, "alpha": 8.0, "ranks": RANKS} | spec)
    return dataclasses.replace(model, lora=targets.lora_of(model, spec, base=base))


def frozen_of(model: ModelConfig, mesh):
    """The model's parameters, where this mesh wants them."""
    whole = tiny.params(model=dataclasses.replace(model, lora=None))
    kept = lora.frozen_as(model, whole, jnp.float32)
    return jax.device_put(kept, sharding.tree_shardings(mesh, lora.frozen_axes(model), kept))


@functools.cache
def fresh_adapters(model: ModelConfig):
    return jax.device_get(jax.jit(lambda key: lora.init(model, key))(jax.random.key(1)))


def adapters_of(model: ModelConfig, mesh):
    made = fresh_adapters(model)
    return jax.device_put(made, sharding.tree_shardings(mesh, lora.trained_axes(model), made))


def steps(model: ModelConfig, mesh, number: int = STEPS):
    """Rollouts and loss of each of some GRPO steps, and the frozen weights and state after them."""
    decoder = Decoder(model, mesh, Sampling(), (tiny.STOP,), LIMIT)
    engine = made_once.engine(decoder, compact=False)
    scorer, optimizer = Scorer(model, mesh, Sampling()), optax.sgd(RATE, 0.9)
    frozen = frozen_of(model, mesh)
    prepare = make_prepare(scorer, AdvantageOptions(), mask_truncated=False, with_old=True)
    objective = losses.Objective(kl_coef=0.1)
    update = make_update(scorer, PolicyLoss(objective), optimizer, num_minibatches=1)
    state = start(adapters_of(model, mesh), model, mesh, optimizer)
    rollouts, loss = [], []
    for n in range(number):
        weights = lora.attached(frozen, state.params, model)
        params, key = engine.publish(weights), keys.key_for(0, "rollout", n)
        rollouts.append(engine.generate(params, PROMPTS, group=GROUP, key=key, temperature=1.0))
        action_PGC = np.arange(LIMIT) < rollouts[-1].length_PG[..., None]
        reward_PG = (action_PGC * (rollouts[-1].completion_PGC % 3)).sum(-1).astype(np.float32)
        placed = transfer.shard_rows(mesh, (rollouts[-1], reward_PG))
        given = prepare(prepare.log_probs(weights, frozen, placed[0]), placed[1])
        state, metrics = update(state, given, 0, frozen=frozen)
        gap = metrics["policy/sampler_gap_max"]
        assert gap < 2e-5, f"the sampler's distribution is not the scorer's: {gap}"
        loss.append(float(metrics["policy/loss"]))
    return rollouts, loss, frozen, state


@functools.cache  # a module's fixture with parameters would be made anew for each test
def on_one_device(base: str):
    model = adapted(base=base)
    rollouts, loss, frozen, state = steps(model, tiny.one_device())
    return model, rollouts, loss, jax.device_get(frozen), jax.device_get(state.params)


@pytest.fixture(params=["auto", "int8", "nf4"])
def alone(request):
    return on_one_device(request.param)


def test_the_sampler_follows_and_the_base_stays(alone):
    """After one update completions are drawn with other probabilities; the base has no new bit."""
    model, rollouts, _, frozen, params = alone
    began = lora.frozen_as(model, tiny.params(), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(began))

    fresh = fresh_adapters(model)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, fresh)
    assert min(jax.tree.leaves(moved)) > 1e-4

    mesh = tiny.one_device()
    decoder = Decoder(model, mesh, Sampling(), (tiny.STOP,), LIMIT)
    engine = made_once.engine(decoder, compact=False)
    base = engine.publish(lora.attached(frozen_of(model, mesh), fresh, model))
    key = keys.key_for(0, "rollout", 1)
    before = engine.generate(base, PROMPTS, group=GROUP, key=key, temperature=1.0)
    assert np.abs(before.logp_PGC[..., 0] - rollouts[1].logp_PGC[..., 0]).max() > 1e-3


# Each kind of base on one mesh: over data, fsdp and tensor adapters beside codes are those beside
# weights, which test_mesh.py has on all meshes.
@pytest.mark.parametrize(
    ("alone", "shape"),
    [("auto", (2, 2, 2)), ("int8", (2, 2, 2)), ("nf4", (1, 2, 4))],
    indirect=["alone"],
    ids=str,
)
def test_a_mesh_changes_nothing(alone, shape):
    """Over fsdp A is split by its inputs, over tensor B by its outputs; deltas count once."""
    model, wanted, want_loss, _, want_params = alone
    mesh = sharding.make_mesh(*shape)

    rollouts, loss, _, state = steps(model, mesh)

    for got, want in zip(rollouts, wanted, strict=True):
        np.testing.assert_array_equal(got.completion_PGC, want.completion_PGC)
        np.testing.assert_allclose(got.logp_PGC, want.logp_PGC, atol=2e-5, rtol=0)
    np.testing.assert_allclose(loss, want_loss, atol=1e-5, rtol=0)
    up = state.params["layers"]["mlp"]["up"]
    assert up["lora_a"].addressable_shards[0].data.shape == (2, 32 // shape[1], 4)
    assert up["lora_b"].addressable_shards[0].data.shape == (2, 4, 48 // shape[2])
    compare = lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5)  # noqa: E731
    jax.tree.map(compare, jax.device_get(state.params), want_params)


def experience() -> Experience:
    rollouts = tiny.rollouts(4, 3, 5)
    advantage_PG = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    return Experience(rollouts, advantage_PG, np.ones((4, 3, 5), bool), None, None)


def updating(model: ModelConfig, optimizer, dtype=jnp.float32):
    scorer = Scorer(model, tiny.one_device(), Sampling(), dtype=dtype)
    component = PolicyLoss(losses.Objective())
    return made_once.updating(scorer, component, optimizer, num_minibatches=1)


def test_gradients_are_those_through_the_merged_kernel():
    """dA = s dW B^T and dB = s A^T dW, where W is the kernel with the product in it."""
    model, mesh, optimizer = adapted(ranks={}), tiny.one_device(), optax.sgd(1.0)
    draw = np.random.default_rng(0)
    given = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape), jnp.float32), lora.trained_shapes(model)
    )
    frozen = frozen_of(model, mesh)
    merged = lora.merged(lora.attached(frozen, given, model), jnp.float32)
    copy = lambda tree: jax.tree.map(jnp.array, tree)  # noqa: E731

    state, _ = updating(model, optimizer)(
        start(copy(given), model, mesh, optimizer), experience(), 0, frozen=frozen
    )
    whole, _ = updating(tiny.MODEL, optimizer)(
        start(copy(merged), tiny.MODEL, mesh, optimizer), experience(), 0
    )

    for module, name in (("attention", "k"), ("mlp", "down")):
        a, b = (given["layers"][module][name][f"lora_{part}"] for part in "ab")
        new = state.params["layers"][module][name]
        by_kernel = merged["layers"][module][name]["kernel"]
        by_kernel = by_kernel - whole.params["layers"][module][name]["kernel"]
        assert np.abs(by_kernel).max() > 1e-3
        want_a = 2.0 * np.einsum("lio,lro->lir", by_kernel, b)
        want_b = 2.0 * np.einsum("lir,lio->lro", a, by_kernel)
        np.testing.assert_allclose(a - new["lora_a"], want_a, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(b - new["lora_b"], want_b, atol=1e-5, rtol=1e-4)


def made_of_size(model: ModelConfig) -> collections.Counter:
    """Operations of the compiled gradient that make arrays as large as a kernel of the base."""
    update, optimizer = updating(model, optax.sgd(1.0)), optax.sgd(1.0)
    state = state_like(model, tiny.one_device(), optimizer)
    frozen = lora.frozen_shapes(model, jnp.float32)
    calls = update.calls(state, experience(), experience().rollouts.length_PG, frozen)
    (call,) = (call for call in calls if call.program is update.gradient)
    plain = dataclasses.replace(model, lora=None)
    shapes = {tuple(x.shape) for x in jax.tree.leaves(lora.trained_shapes(plain)) if x.size > 1000}
    shapes |= {shape[1:] for shape in shapes if len(shape) == 3} | {s[::-1] for s in shapes}
    found: collections.Counter = collections.Counter()
    for line in call.lower().compile().as_text().splitlines():
        made = re.match(r"\s*(?:ROOT )?%?\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if made and tuple(int(n) for n in made[1].split(",") if n) in shapes:
            found[made[2]] += 1
    return found


def test_the_compiled_update_has_no_gradient_of_the_base():
    """Kernels of the base, embedding and head are read and sliced; none is summed or zeroed.

    Sizes that no activation has: of 27 tokens at most, kernels of 64 by 72 and more.
    """
    odd = dataclasses.replace(
        tiny.MODEL, vocab_size=104, width=64, mlp_width=88, num_heads=4, head_size=24
    )
    reads = {"parameter", "get-tuple-element", "dynamic-slice", "bitcast", "fusion", "copy"}

    of_adapters = made_of_size(adapted(model=odd, ranks={}))

    assert of_adapters and not of_adapters.keys() - reads, of_adapters
    assert made_of_size(odd).keys() - reads >= {"dot"}  # where all learns there are such


BY_BLOCKS = dataclasses.replace(tiny.MODEL, width=64, mlp_width=128, head_size=16)


@pytest.mark.parametrize(
    ("base", "model"),
    [("int8", tiny.MODEL), ("nf4", tiny.MODEL), ("nf4", BY_BLOCKS)],
    ids=["int8", "nf4", "nf4 by blocks"],
)
def test_a_base_in_codes_is_its_dequantized_self(base, model):
    """The same update, to float32's rounding: x has its gradient through the codes."""
    mesh, optimizer = tiny.one_device(), SGD
    in_codes, plain = adapted(base=base, model=model), adapted(model=model)
    codes = frozen_of(in_codes, mesh)
    given = adapters_of(plain, mesh)
    got, want = (
        updating(model, optimizer)(
            start(jax.tree.map(jnp.array, given), model, mesh, optimizer),
            experience(),
            0,
            frozen=frozen,
        )[0].params
        for model, frozen in ((in_codes, codes), (plain, lora.merged(codes, jnp.float32)))
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-4), got, want)
    differs = jax.tree.map(lambda g, w: float(np.abs(g - w).max()), got, given)
    assert max(jax.tree.leaves(differs)) > 1e-3


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_bfloat16_goes_through_codes(base):
    """Products of the backward pass have their operands' dtype."""
    model = adapted(base=base)
    state = start(adapters_of(model, tiny.one_device()), model, tiny.one_device(), optax.sgd(1.0))
    frozen = lora.frozen_as(model, tiny.params(), jnp.bfloat16)
    state, metrics = updating(model, optax.sgd(1.0), jnp.bfloat16)(
        state, experience(), 0, frozen=frozen
    )
    assert not metrics["skipped"] and np.isfinite(metrics["policy/grad_norm"])
    assert np.abs(state.params["layers"]["mlp"]["up"]["lora_b"]).max() > 0
