"""Completions of several parts: each is a text of its own, and all are one completion."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.kernels import attention, choice, gpu_cudnn
from grpo_jax.kernels.row_blocks import RowBlocks
from grpo_jax.learner import train_state, update
from grpo_jax.learner.scoring import Scorer
from grpo_jax.structs import Experience, Sampling

P, G, C = 2, 3, 16
BEGINS = {(0, 1): (5,), (1, 0): (4, 10), (1, 2): (7,)}  # of further parts; the others have one
CONTEXT = 2  # tokens at the beginning of a further part that are no actions


def experience_of_parts() -> Experience:
    """Completions of full length, so that every part has actions."""
    rng, rollouts = np.random.default_rng(3), tiny.rollouts(P, G, C)
    begin_PGC, chosen_PGC = np.zeros((P, G, C), np.int32), np.ones((P, G, C), bool)
    for at, begins in BEGINS.items():
        for begin in begins:
            begin_PGC[(*at, slice(begin, None))] = begin
            chosen_PGC[(*at, slice(begin, begin + CONTEXT))] = False
    ids_PGC = rng.integers(2, tiny.MODEL.vocab_size, (P, G, C), dtype=np.int32)
    near = lambda: rng.normal(-3, 0.5, (P, G, C)).astype(np.float32)  # noqa: E731
    return Experience(
        rollouts=rollouts.replace(
            completion_PGC=ids_PGC,
            length_PG=np.full((P, G), C, np.int32),
            chosen_PGC=chosen_PGC,
            begin_PGC=begin_PGC,
        ),
        advantage=rng.normal(size=(P, G)).astype(np.float32),
        action_PGC=chosen_PGC,
        old_logp_PGC=near(),
        ref_logp_PGC=near(),
    )


def plain_loss(params, experience: Experience, objective: losses.Objective):
    """Every part in a row of its own; then the sums over the parts of each completion, by hand."""
    rollouts, width = experience.rollouts, experience.rollouts.prompt_PQ.shape[1] + C
    rows, places = [], []  # a row's ids; of its tokens (p, g, c), and where they are predicted
    for p, g in np.ndindex(P, G):
        n = rollouts.prompt_length_P[p]
        for begin, past in zip(edges := [0, *BEGINS.get((p, g), ()), C], edges[1:]):
            ids = [*rollouts.prompt_PQ[p, :n], *rollouts.completion_PGC[p, g, begin:past]]
            places += [(len(rows), n + c - begin - 1, p, g, c) for c in range(begin, past)]
            rows.append(np.pad(ids, (0, width - len(ids))))
    row, at, p, g, c = np.array(places).T
    log_prob = jax.vmap(lambda ids: tiny.plain_log_probs(params, ids))(jnp.asarray(rows))[row, at]
    token = rollouts.completion_PGC[p, g, c]
    logp = jnp.zeros((P, G, C)).at[p, g, c].set(log_prob[np.arange(len(row)), token])
    action, number = experience.action_PGC, experience.action_PGC.sum(-1, keepdims=True)
    change = jnp.where(action, logp - experience.old_logp_PGC, 0.0)
    if objective.ratio == "sequence":  # over all parts of an episode
        change = change.sum(-1, keepdims=True) / number + jnp.zeros_like(change)
    ratio, advantage = jnp.exp(change), experience.advantage[..., None]
    loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.3) * advantage)
    difference = experience.ref_logp_PGC - logp
    loss += 0.2 * (jnp.exp(difference) - difference - 1)
    loss = jnp.where(action, loss, 0.0)
    if objective.normalizer == "sequence":  # an episode counts once, whatever its parts
        return (loss.sum(-1) / number[..., 0]).mean()
    return loss.sum() / action.sum()


@pytest.mark.parametrize(
    ("normalizer", "ratio", "kernels"),
    [
        ("token", "token", attention),  # in lanes
        ("sequence", "sequence", RowBlocks(block=4, narrow=0)),  # in rows without lanes
    ],
)
def test_parts_give_the_loss_and_gradient_of_rows_of_their_own(normalizer, ratio, kernels):
    experience, optimizer = experience_of_parts(), optax.sgd(1.0)
    objective = losses.Objective(0.2, 0.3, kl_coef=0.2, normalizer=normalizer, ratio=ratio)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: plain_loss(p, experience, objective)))(
        tiny.params()
    )
    scorer = Scorer(tiny.MODEL, tiny.one_device(), Sampling(), kernels=kernels)
    program = update.make_update(scorer, PolicyLoss(objective), optimizer, num_minibatches=1)
    state = train_state.start(tiny.params(), tiny.MODEL, scorer.mesh, optimizer)
    state, metrics = program(state, experience, 0)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert largest > 1e-3
    jax.tree.map(
        lambda old, new, g: np.testing.assert_allclose(old - new, g, atol=1e-5 * largest, rtol=0),
        *(tiny.params(), state.params, grads),
    )


def test_a_kernel_without_segments_is_not_used_for_parts(monkeypatch):
    monkeypatch.setattr(gpu_cudnn, "why_unavailable", lambda *of: "")
    monkeypatch.setattr(gpu_cudnn, "choose", lambda *of: "cudnn")
    of = dataclasses.replace(tiny.MODEL), tiny.one_device(), jnp.bfloat16
    assert choice.choose("auto", *of) == choice.choose("cudnn", *of) == "cudnn"
    assert choice.choose("auto", *of, in_parts=True) != "cudnn"
    with pytest.raises(ValueError, match=r'environment\.history = "fork"'):
        choice.choose("cudnn", *of, in_parts=True)
