"""Advantages and returns by GAE: by hand, and against a transcription in float64."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax.algorithm import advantages, gae
from grpo_jax.algorithm.gae import GAE

P, G, C = 3, 2, 7


def transcribed(options, reward, value, action, kl_coef, logp, ref_logp, whitens):
    """From the papers' sums, completion by completion; no recursion."""
    adv, ret = np.zeros((P, G, C)), np.zeros((P, G, C))
    for p in range(P):
        for g in range(G):
            at = np.flatnonzero(action[p, g])
            r = np.zeros(len(at))
            if len(at):
                r[-1] = reward[p, g]
            r -= kl_coef * (logp - ref_logp)[p, g, at]
            v = np.append(value[p, g, at], 0.0)
            delta = r + options.discount * v[1:] - v[:-1]
            lam = options.policy_lambda
            if options.length_scale and len(at):
                lam = max(1 - 1 / (options.length_scale * len(at)), 0)
            for i in range(len(at)):
                later = np.arange(len(at) - i)
                adv[p, g, at[i]] = ((options.discount * lam) ** later * delta[i:]).sum()
                of_critic = (options.discount * options.critic_lambda) ** later
                ret[p, g, at[i]] = (of_critic * delta[i:]).sum() + v[i]
    if whitens:
        there = adv[action]
        adv[action] = (there - there.mean()) / np.sqrt(there.var() + 1e-8)
    return adv, ret


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    action = rng.random((P, G, C)) > 0.3  # the others are a tool's
    action[1, 1] = False  # a completion that is left out
    action[0, 0] = np.arange(C) == 0  # one of a single token
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    return draw(P, G), draw(P, G, C), action, draw(P, G, C), draw(P, G, C)


@pytest.mark.parametrize(
    ("options", "kl_coef", "whitens"),
    [
        (GAE(), 0.0, False),
        (GAE(0.9, 0.8, 1.0), 0.3, True),
        (GAE(0.99, 0.5, 0.0, length_scale=0.4), 0.1, True),
        (GAE(1.0, 1.0, 1.0, length_scale=0.05), 0.0, False),  # short: lambda is 0
    ],
)
def test_it_is_the_sum_of_the_papers(given, options, kl_coef, whitens):
    reward, value, action, logp, ref_logp = given
    how = {"kl_coef": kl_coef, "logp_PGC": logp, "ref_logp_PGC": ref_logp, "whitens": whitens}
    got = gae.evaluate(options, reward, value, action, **how)
    want = transcribed(options, reward, value, action, kl_coef, logp, ref_logp, whitens)
    for found, wanted in zip(got, want):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert np.abs(got[0]).max() > 0.1


def test_by_hand():
    """Two tokens with a tool's between them, which the sums pass over.

    delta 0.5 * 3 - 2 = -0.5 and 4 - 3 = 1; with lambda 0.5 advantages -0.5 + 0.25 * 1 and 1. The
    critic's own lambda of 1: returns 2 - 0.5 + 0.5 * 1 and 3 + 1.
    """
    action = np.array([[[True, False, True, False]]])
    value = np.array([[[2.0, 9.0, 3.0, 9.0]]])
    adv, ret = gae.evaluate(GAE(0.5, 0.5, 1.0), np.array([[4.0]]), value, action)
    assert adv.tolist() == [[[-0.25, 0.0, 1.0, 0.0]]]
    assert ret.tolist() == [[[2.0, 0.0, 4.0, 0.0]]]


def test_an_unknown_reward_teaches_neither(given):
    reward, value, action, _, _ = given
    unknown = reward.copy()
    unknown[2, 0] = np.nan
    adv, ret = gae.evaluate(GAE(), unknown, value, action, whitens=True)
    assert np.all(adv[2, 0] == 0) and np.isfinite(adv).all()
    np.testing.assert_array_equal(ret[2, 0], np.where(action[2, 0], value[2, 0], 0))
    others = action.copy()
    others[2, 0] = False
    alone, _ = gae.evaluate(GAE(), reward, value, others, whitens=True)
    np.testing.assert_allclose(adv, alone, rtol=1e-12)


def test_float32_stays_so(given):
    reward, value, action, _, _ = given
    adv, ret = gae.evaluate(GAE(), reward, value.astype(np.float32), action)
    assert adv.dtype == ret.dtype == np.float32


def test_a_preset_with_a_critic_has_no_advantages_of_groups(given):
    with pytest.raises(ValueError, match="from a critic's values"):
        advantages.evaluate("ppo", given[0][..., None], np.ones(1))
