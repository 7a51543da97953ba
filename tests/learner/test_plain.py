"""Loss and gradient against a plain implementation: a row for each completion, nothing shared."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import made_once
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.kernels.row_blocks import RowBlocks
from grpo_jax.learner import scoring, train_state
from grpo_jax.learner.scoring import Scorer
from grpo_jax.structs import Experience, Rollouts, Sampling

P, G, C = 4, 5, 9
MODEL, SGD = tiny.MODEL, optax.sgd(1.0)
FULL = losses.Objective(0.2, 0.3, kl_coef=0.2, entropy_coef=0.05, max_tokens=C)
NORMALIZERS = ("token", "sequence", "constant")


def plain_loss(params, experience, normalizer: str, kl_coef=0.2, entropy_coef=0.05):
    """The objective from the papers' formulas, every completion after a prompt of its own."""
    rollouts, tokens = experience.rollouts, experience.action_PGC
    ids = np.zeros((P, G, rollouts.prompt_PQ.shape[1] + C), np.int32)  # padding is never seen
    at = rollouts.prompt_length_P[:, None, None] + np.arange(C)[None, None]
    for p, g in np.ndindex(P, G):
        ids[p, g, : at[p, 0, 0]] = rollouts.prompt_PQ[p, : at[p, 0, 0]]
        ids[p, g, at[p, 0]] = rollouts.completion_PGC[p, g]
    each = jax.vmap(jax.vmap(lambda row: tiny.plain_log_probs(params, row)))
    p, g = np.arange(P)[:, None, None], np.arange(G)[None, :, None]
    log_prob = each(jnp.asarray(ids))[p, g, at - 1]
    logp = log_prob[p, g, np.arange(C)[None, None], rollouts.completion_PGC]
    ratio = jnp.exp(logp - experience.old_logp_PGC)
    advantage = experience.advantage
    advantage = advantage if advantage.ndim == 3 else advantage[..., None]
    loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.3) * advantage)
    if experience.top_entropy_PGC is not None:
        loss = jnp.where(experience.top_entropy_PGC, loss, 0.0)
    difference = experience.ref_logp_PGC - logp
    loss += kl_coef * (jnp.exp(difference) - difference - 1)
    loss += entropy_coef * (jnp.exp(log_prob) * log_prob).sum(-1)
    loss = jnp.where(tokens, loss, 0.0)
    if normalizer == "sequence":
        return (loss.sum(-1) / tokens.sum(-1)).mean()
    return loss.sum() / {"token": tokens.sum(), "constant": tokens.size}[normalizer]


def experience_of(rollouts: Rollouts) -> Experience:
    rng = np.random.default_rng(0)
    near = lambda: (rollouts.logp_PGC + rng.normal(0, 0.5, (P, G, C))).astype(np.float32)  # noqa: E731
    return Experience(
        rollouts=rollouts,
        advantage=rng.normal(size=(P, G)).astype(np.float32),
        action_PGC=np.arange(C) < rollouts.length_PG[..., None],
        old_logp_PGC=near(),
        ref_logp_PGC=near(),
    )


def wanted_of(experience: Experience, normalizer: str, **coefs: float):
    loss = lambda params: plain_loss(params, experience, normalizer, **coefs)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(tiny.params())


@pytest.fixture(scope="module")
def experience() -> Experience:
    return experience_of(tiny.rollouts(P, G, C))


@pytest.fixture(scope="module")
def wanted(experience):
    return {name: wanted_of(experience, name) for name in NORMALIZERS}


def check_update(experience: Experience, wanted, normalizer: str, scorer: Scorer) -> None:
    """One update with a learning rate of 1 gives the loss and moves by the gradient."""
    objective = dataclasses.replace(FULL, normalizer=normalizer)
    program = made_once.updating(scorer, PolicyLoss(objective), SGD, num_minibatches=1)
    state = jax.tree.map(jnp.array, tiny.params())
    state = train_state.start(state, MODEL, scorer.mesh, SGD)
    state, metrics = program(state, experience, 0)
    loss, grads = wanted
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-5)
    got = jax.tree.map(lambda old, new: np.asarray(old - new), tiny.params(), state.params)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert largest > 1e-3
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * largest), got, grads
    )


# Tokens of a row: all prompts and completions in one, two groups, one, and less than a group.
CASES = [("token", 1000), ("sequence", 100), ("constant", 40), ("token", 40), ("sequence", 16)]


@pytest.mark.parametrize(("normalizer", "at_once"), CASES)
def test_packed_rows_give_the_plain_loss_and_gradient(
    experience, wanted, normalizer, at_once, monkeypatch
):
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    scorer = Scorer(MODEL, tiny.one_device(), Sampling())
    packed = scorer.microbatches(experience.rollouts, np.arange(P))
    rows, lanes = packed.groups_SMJ[0, : packed.number], packed.lane_SMJWT[0, : packed.number]
    assert rows.shape == {1000: (1, 4), 100: (3, 2), 40: (4, 1)}.get(at_once, rows.shape)
    assert ((rows >= 0).sum() > P) == (at_once == 16)  # groups are split
    heads = packed.token_SMBX[0, : packed.number, 0] % C == 1  # entries that begin a completion
    if at_once > 16:  # some share a lane
        assert heads.sum() > (lanes.reshape(len(rows), -1, C - 1)[..., 0] >= 0).sum()
    check_update(experience, wanted[normalizer], normalizer, scorer)


@pytest.mark.parametrize(("normalizer", "at_once"), [("sequence", 100), ("token", 16)])
def test_every_turn_has_an_advantage_of_its_own(experience, normalizer, at_once, monkeypatch):
    """Of three tokens each; groups in one row, and split over several."""
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    turn_PGC = np.random.default_rng(3).normal(size=(P, G, 3)).astype(np.float32).repeat(3, axis=-1)
    by_turn = experience.replace(advantage=turn_PGC)
    scorer = Scorer(MODEL, tiny.one_device(), Sampling())
    check_update(by_turn, wanted_of(by_turn, normalizer), normalizer, scorer)


@pytest.mark.parametrize(("normalizer", "at_once"), [("token", 100), ("sequence", 16)])
def test_rows_without_lanes_give_the_plain_loss_and_gradient(
    experience, wanted, normalizer, at_once, monkeypatch
):
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    kernels = RowBlocks(block=8, narrow=0)
    scorer = Scorer(MODEL, tiny.one_device(), Sampling(), kernels=kernels)
    assert not scorer.microbatches(experience.rollouts, np.arange(P)).lane_SMJWT.size
    check_update(experience, wanted[normalizer], normalizer, scorer)


@pytest.mark.parametrize("at_once", [184, 46])
def test_completions_of_like_length_stay_where_attention_sees_them(at_once, monkeypatch):
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    rollouts, rng = tiny.rollouts(P, G, C), np.random.default_rng(1)
    length_PG = rng.integers(C - 1, C + 1, (P, G), dtype=np.int32)
    length_PG[1, 2] = 1
    experience = experience_of(rollouts.replace(length_PG=length_PG))
    scorer = Scorer(MODEL, tiny.one_device(), Sampling())
    packed = scorer.microbatches(experience.rollouts, np.arange(P))
    entry = packed.lane_SMJWT[0].reshape(packed.token_SMBX[0, :, 0].shape)[: packed.number]
    assert ((entry == np.arange(entry.shape[1])) | (entry < 0)).all()
    assert (entry < 0).any()
    check_update(experience, wanted_of(experience, "token"), "token", scorer)


def test_an_experience_has_its_own_coefficients_and_tokens(experience, monkeypatch):
    """In the place of the objective's, which is 0 for the entropy; of the tokens a third."""
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", 16)  # groups are split
    monkeypatch.setitem(globals(), "FULL", dataclasses.replace(FULL, entropy_coef=0.0))
    alike = lambda value: np.full((P, G), value, np.float32)  # noqa: E731
    given = experience.replace(
        kl_coef_PG=alike(0.7),
        entropy_coef_PG=alike(0.3),
        top_entropy_PGC=np.random.default_rng(2).random((P, G, C)) < 1 / 3,
    )
    wanted = wanted_of(given, "sequence", kl_coef=0.7, entropy_coef=0.3)
    check_update(given, wanted, "sequence", Scorer(MODEL, tiny.one_device(), Sampling()))
