"""The controllers of coefficients against transcriptions of where they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_jax.algorithm.adaptive import AdaptiveEntropy, AdaptiveKL

RNG = np.random.default_rng(0)


class VerlsController:
    """verl 0.9.1, trainer/ppo/core_algos.py, AdaptiveKLController; as in lm-human-preferences."""

    def __init__(self, init_kl_coef, target_kl, horizon):
        self.value, self.target, self.horizon = init_kl_coef, target_kl, horizon

    def update(self, current_kl, n_steps):
        proportional_error = np.clip(current_kl / self.target - 1, -0.2, 0.2)
        self.value *= 1 + proportional_error * n_steps / self.horizon


def test_the_kl_coefficient_is_that_of_verl():
    theirs, kept = VerlsController(0.02, 0.1, 1000), {}
    ours = AdaptiveKL(start=0.02, target=0.1, horizon=1000, completions=64)
    assert ours.in_force(kept) == 0.02
    for kl in np.concatenate([RNG.uniform(0, 0.3, 200), RNG.uniform(0.09, 0.11, 200)]):
        kept = {**kept, **ours.after(kept, {"policy/kl": kl, "policy/entropy": 1.0})}
        theirs.update(kl, 64)
        assert ours.in_force(kept) == pytest.approx(theirs.value, rel=1e-12)
    assert abs(theirs.value / 0.02 - 1) > 0.1


def test_the_kl_coefficient_by_hand():
    """K = 250 / 1000; e = clip(KL / 0.1 - 1, -0.2, 0.2)."""
    ours = AdaptiveKL(start=1.0, target=0.1, horizon=1000, completions=250)
    after = lambda kl: ours.after({}, {"policy/kl": kl})["kl_coef"]  # noqa: E731
    assert after(0.1) == 1.0
    assert after(0.11) == pytest.approx(1 + 0.1 / 4)
    assert after(5.0) == after(0.12) == pytest.approx(1.05)
    assert after(-5.0) == after(0.0) == pytest.approx(0.95)


class TrlsRule:
    """TRL 1.16, grpo_trainer.py, _compute_loss: what it applies, and how it goes on from there."""

    def __init__(self, coef, target, delta, least, most):
        self.coef, self.target, self.delta, self.least, self.most = coef, target, delta, least, most
        self.last = float("inf")

    def step(self, world_entropy):
        applied = self.coef if self.last <= self.target else 0.0
        if world_entropy <= self.target:
            self.coef = min(self.coef + self.delta, self.most)
        else:
            self.coef = max(self.coef - self.delta, self.least)
        self.last = world_entropy
        return applied


@pytest.mark.parametrize("start", [0.0, 0.013, 0.03])
def test_the_entropy_coefficient_is_that_of_trl(start):
    theirs, kept = TrlsRule(start, 0.5, 0.005, 0.0, 0.03), {}
    ours = AdaptiveEntropy(start, target=0.5, delta=0.005, lowest=0.0, highest=0.03)
    drifting = np.repeat(RNG.uniform(0.3, 0.7, 30), 10) + RNG.normal(0, 0.05, 300)
    applied = []
    for entropy in [0.5, *drifting]:
        applied.append(theirs.step(entropy))
        assert ours.in_force(kept) == applied[-1]
        kept = {**kept, **ours.after(kept, {"policy/kl": 9.0, "policy/entropy": entropy})}
        assert kept["entropy_coef"] == theirs.coef
    assert applied[0] == 0 and {0.0, 0.03} <= set(applied) and len(set(applied)) > 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_changes_nothing(bad):
    metrics = {"policy/kl": bad, "policy/entropy": bad}
    assert AdaptiveKL(0.1, 0.1, 100, 10).after({"kl_coef": 0.3}, metrics) == {}
    assert AdaptiveEntropy(0.1, 0.2, 0.01, 0.0, 1.0).after({}, metrics) == {}
