"""How often the policy solves each training problem, measured while it trains; no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.data import streams


@dataclasses.dataclass(frozen=True)
class PassRates:
    """Of each of N training problems, how often it was asked and how often it was solved.

    The rate is an exponential mean over the problem's groups, since the policy changes: the newest
    group counts `newest`, all earlier ones the rest. It begins with the first group's mean.
    """

    times_N: np.ndarray  # int64: groups measured
    rate_N: np.ndarray  # float64; meaningless where times_N is 0

    @staticmethod
    def unseen(number: int) -> PassRates:
        return PassRates(np.zeros(number, np.int64), np.zeros(number))

    def after(self, problem_P: Sequence[int], value_P: Sequence[float], newest: float) -> PassRates:
        """These rates after groups of the problems with these means; NaN is not measured."""
        times_N, rate_N = self.times_N.copy(), self.rate_N.copy()
        for problem, value in zip(problem_P, value_P, strict=True):
            if np.isnan(value):
                continue
            share = newest if times_N[problem] else 1.0
            rate_N[problem] += share * (value - rate_N[problem])
            times_N[problem] += 1
        return PassRates(times_N, rate_N)

    @property
    def is_seen_N(self) -> np.ndarray:  # noqa: N802
        """Whether each problem was measured, bool [N]."""
        return self.times_N > 0

    def easy_N(self, high: float) -> np.ndarray:  # noqa: N802
        """Whether each problem's rate is above `high`, bool [N]; False if it was never measured."""
        return self.is_seen_N & (self.rate_N > high)

    def hard_N(self, low: float) -> np.ndarray:  # noqa: N802
        """The same for rates below `low`."""
        return self.is_seen_N & (self.rate_N < low)

    def as_json(self) -> dict[str, Any]:
        """The measured problems, as JSON, without loss."""
        seen = np.flatnonzero(self.is_seen_N)
        return {
            "number": len(self.times_N),
            "seen": seen.tolist(),
            "times": self.times_N[seen].tolist(),
            "rates": self.rate_N[seen].tolist(),
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> PassRates:
        """The rates that `as_json` has written."""
        rates = PassRates.unseen(values["number"])
        rates.times_N[values["seen"]] = values["times"]
        rates.rate_N[values["seen"]] = values["rates"]
        return rates


@dataclasses.dataclass(frozen=True)
class Preference:
    """Which problems are drawn more often than others, by their measured rates.

    A group has the largest gradient where its problem is solved half of the time: the expected
    improvement is bounded from below by the variance p (1 - p) of right and wrong (Bae et al. 2025,
    arXiv:2504.03380). That paper keeps the groups of a batch whose accuracy lies in a band. Here
    the band decides what is asked, which costs no completions: a problem inside of it, or never
    measured, has the weight 1, one outside `outside_weight`. That is above 0, so every rate is
    measured again at some time.
    """

    low: float  # the band, both ends included
    high: float
    outside_weight: float = 1.0
    replay_share: float = 0.0  # of a draw: problems above the band

    def draw(self, rates: PassRates, seed: int, number: int, count: int) -> np.ndarray:
        """Numbers of the problems of a draw, int64 [count]: a function of the arguments alone.

        Drawn by weight, without replacement (by the largest of log weight plus Gumbel noise), so a
        problem occurs twice only if there are too few. With a `replay_share` so many come from the
        problems above the band, each equally often, and the others from the rest; if one of the two
        has too few problems, the other makes up for it.
        """
        rng = streams.stream(seed, "choice", number)
        easy_N = rates.easy_N(self.high)
        outside_N = easy_N | rates.hard_N(self.low)
        weight_N = np.where(outside_N, np.log(self.outside_weight), 0.0)
        order_N = np.argsort(-(weight_N + rng.gumbel(size=len(weight_N))), kind="stable")
        if self.replay_share:
            solved, others = order_N[easy_N[order_N]], order_N[~easy_N[order_N]]
            replayed = min(round(self.replay_share * count), len(solved))
            order_N = np.concatenate([solved[:replayed], others, solved[replayed:]])
        return rng.permutation(np.resize(order_N, count))
