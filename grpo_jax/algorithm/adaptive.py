"""Coefficients of the loss that follow a metric of each step.

A controller keeps a few numbers from step to step, in a dict that is part of the run's state; it is
empty before the first step has ended, but for the number of the `step`. All is arithmetic on Python
floats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from grpo_jax.algorithm.hybrid_methods import Schedule

Kept = Mapping[str, float]  # of all controllers of a run


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """The KL coefficient that keeps the KL to the reference near a target.

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2: after each step the coefficient is
    multiplied by 1 + K e with e = clip(KL / target - 1, -0.2, 0.2). K is the completions of a step
    over `horizon`, as in the paper's code and in verl's AdaptiveKLController. The paper's KL is of
    a whole completion; here it is the mean over tokens, as in verl.
    """

    start: float
    target: float  # nats per token
    horizon: float  # completions
    completions: int  # of a step

    coefficient: ClassVar[str] = "kl_coef"
    metric: ClassVar[str] = "policy/kl_coef"

    def in_force(self, kept: Kept) -> float:
        """The coefficient of the next updates."""
        return kept.get("kl_coef", self.start)

    def after(self, kept: Kept, metrics: Kept) -> dict[str, float]:
        """What is kept after a step with these metrics; a KL that is not finite changes nothing."""
        if not math.isfinite(kl := metrics["policy/kl"]):
            return {}
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return {"kl_coef": self.in_force(kept) * (1 + error * self.completions / self.horizon)}


@dataclasses.dataclass(frozen=True)
class AdaptiveEntropy:
    """The coefficient of the entropy bonus that keeps the entropy from falling below a target.

    He et al. 2025 (Skywork-OR1), arXiv:2505.22312: after each step the coefficient grows by `delta`
    if the entropy was at or below the target, else it falls by `delta`, within its bounds. The
    bonus is given only while the last measured entropy is at or below the target. So does TRL
    (`use_adaptive_entropy`), whose first step has no bonus either.
    """

    start: float
    target: float  # nats per token
    delta: float
    lowest: float
    highest: float

    coefficient: ClassVar[str] = "entropy_coef"
    metric: ClassVar[str] = "policy/entropy_coef"

    def in_force(self, kept: Kept) -> float:
        """The coefficient of the next updates; 0 while the entropy is above the target."""
        if kept.get("entropy", math.inf) > self.target:
            return 0.0
        return kept["entropy_coef"]

    def after(self, kept: Kept, metrics: Kept) -> dict[str, float]:
        """What is kept after a step with these metrics; see `AdaptiveKL.after`."""
        if not math.isfinite(entropy := metrics["policy/entropy"]):
            return {}
        change = self.delta if entropy <= self.target else -self.delta
        coef = min(max(kept.get("entropy_coef", self.start) + change, self.lowest), self.highest)
        return {"entropy_coef": coef, "entropy": entropy}


@dataclasses.dataclass(frozen=True)
class Mix:
    """The share of the nll in the loss of a hybrid, which follows from the step alone."""

    schedule: Schedule

    coefficient: ClassVar[str] = "mix"
    metric: ClassVar[str] = "hybrid/mix"

    def in_force(self, kept: Kept) -> float:
        """The share in the updates of the step `kept["step"]`, from 0."""
        return self.schedule.at(int(kept["step"]))

    def after(self, kept: Kept, metrics: Kept) -> dict[str, float]:
        """Nothing is kept."""
        return {}


Controller = AdaptiveKL | AdaptiveEntropy | Mix
