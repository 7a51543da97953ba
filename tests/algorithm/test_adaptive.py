"""The controllers of coefficients against transcriptions of where they come from."""

from __future__ import annotations

import collections
import math
import types

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


def test_the_rule_is_that_of_trls_own_code():
    """Where TRL is installed: its loss is the bonus alone, since all advantages are 0."""
    trl, torch = pytest.importorskip("trl"), pytest.importorskip("torch")
    entropy = None
    ones = torch.ones(2, 3)
    theirs = types.SimpleNamespace(
        args=types.SimpleNamespace(
            delta=None, entropy_target=0.5, entropy_coef_delta=0.005, entropy_coef_min=0.0,
            entropy_coef_max=0.03,
        ),
        accelerator=types.SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        model=types.SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *a, **k: (-ones, entropy * ones, None),
        _metrics={"train": collections.defaultdict(list)},
        loss_type="grpo", importance_sampling_level="token", beta=0.0, epsilon_low=0.2,
        epsilon_high=0.2, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        aux_loss_enabled=False, use_vllm=False, current_gradient_accumulation_steps=1,
        use_adaptive_entropy=True, _entropy_bonus_enabled=True, entropy_coef=0.013,
        _last_world_entropy=math.inf, _entropy_window_stats=None,
    )  # fmt: skip
    ids = torch.ones(2, 3, dtype=torch.long)
    given = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": ids}
    given["advantages"] = torch.zeros(2)
    ours, kept = AdaptiveEntropy(0.013, target=0.5, delta=0.005, lowest=0.0, highest=0.03), {}
    for entropy in [0.75, 0.25, 0.25, 0.5, 0.25, 0.25, 0.75, 0.75, 0.25, *([0.75] * 9), 0.25, 0.25]:
        loss = trl.GRPOTrainer._compute_loss(theirs, theirs.model, given)
        assert ours.in_force(kept) == pytest.approx(-float(loss) / entropy, abs=1e-8)
        kept = {**kept, **ours.after(kept, {"policy/entropy": entropy})}
        assert kept == {"entropy_coef": theirs.entropy_coef, "entropy": entropy}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_changes_nothing(bad):
    metrics = {"policy/kl": bad, "policy/entropy": bad}
    assert AdaptiveKL(0.1, 0.1, 100, 10).after({"kl_coef": 0.3}, metrics) == {}
    assert AdaptiveEntropy(0.1, 0.2, 0.01, 0.0, 1.0).after({}, metrics) == {}
