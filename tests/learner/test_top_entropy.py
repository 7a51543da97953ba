"""The tokens that carry the policy gradient, from the entropies of the pass before the updates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import scoring
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.structs import Sampling

P, G, C, SHARE = 8, 3, 5, 0.25
REWARD_PG = np.random.default_rng(1).uniform(size=(P, G)).astype(np.float32)


@functools.cache
def wanted() -> np.ndarray:
    """By NumPy, from a network that computes every completion in a row of its own."""
    rollouts, log_probs = tiny.rollouts(P, G, C), jax.jit(tiny.plain_log_probs)
    entropy_PGC = np.zeros((P, G, C))
    for p, g in np.ndindex(P, G):
        prompt_C = rollouts.prompt_PQ[p, : rollouts.prompt_length_P[p]]
        row = np.concatenate([prompt_C, rollouts.completion_PGC[p, g], np.zeros(6, np.int32)])
        log_prob = np.asarray(log_probs(tiny.params(), row[:11]), np.float64)
        entropy = -(np.exp(log_prob) * log_prob).sum(-1)
        entropy_PGC[p, g] = entropy[len(prompt_C) - 1 :][:C]
    there_PGC = np.arange(C) < rollouts.length_PG[..., None]
    actions_PGC = there_PGC & rollouts.stopped_PG[..., None]
    bound = np.quantile(entropy_PGC[actions_PGC], 1 - SHARE)
    assert np.abs(entropy_PGC[actions_PGC] - bound).min() > 1e-4  # rounding moves none across it
    return actions_PGC & (entropy_PGC >= bound)


@pytest.mark.parametrize(("shape", "at_once"), [((1, 1, 1), 16), ((2, 2, 2), 40)], ids=str)
def test_they_are_those_of_a_row_each(shape, at_once, monkeypatch):
    """However rows are packed, and on any mesh. A truncated completion has no part in it."""
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    mesh = tiny.one_device() if shape == (1, 1, 1) else sharding.make_mesh(*shape)
    prepare = make_prepare(
        Scorer(tiny.MODEL, mesh, Sampling()),
        AdvantageOptions(),
        mask_truncated=True,
        with_old=True,
        top_entropy_share=SHARE,
    )
    rollouts, reward_PG = transfer.shard_rows(mesh, (tiny.rollouts(P, G, C), REWARD_PG))
    params = tiny.params()
    given = prepare.log_probs(params, tiny.params(7), rollouts)

    experience = prepare(given, reward_PG)

    order_P = np.arange(P) if given.order_P is None else given.order_P
    np.testing.assert_array_equal(experience.top_entropy_PGC, wanted()[order_P])
    assert 0.2 < wanted().sum() / np.asarray(experience.action_PGC).sum() < 0.3
    actions_PGC = np.asarray(experience.action_PGC)
    for got, weights in (
        (experience.old_logp_PGC, params),
        (experience.ref_logp_PGC, tiny.params(7)),
    ):
        want = tiny.logp(Scorer(tiny.MODEL, tiny.one_device(), Sampling()), weights,
                         tiny.rollouts(P, G, C))[order_P]  # fmt: skip
        np.testing.assert_allclose(np.asarray(got)[actions_PGC], want[actions_PGC], atol=2e-5)


def test_without_a_share_nothing_is_selected_and_no_entropy_kept():
    scorer = Scorer(tiny.MODEL, tiny.one_device(), Sampling())
    prepare = make_prepare(scorer, AdvantageOptions(), mask_truncated=False, with_old=True)
    rollouts = tiny.rollouts(P, G, C)
    given = prepare.log_probs(tiny.params(), None, rollouts)
    assert given.entropy_PGC is None
    assert prepare(given, jnp.asarray(REWARD_PG)).top_entropy_PGC is None
    length_PG = rollouts.length_PG
    calls = prepare.calls(tiny.params(), None, jax.tree.map(jnp.asarray, rollouts), length_PG)
    assert [call.name for call in calls] == ["score policy", "advantages"]
