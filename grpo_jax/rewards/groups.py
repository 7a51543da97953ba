"""Which groups of completions teach something: those whose rewards are not all equal."""

from __future__ import annotations

import numpy as np

from grpo_jax.rewards.scores import Scores

FLOOR = 1e-4
"""A group whose rewards deviate by no more counts as equal, as in `algorithm.advantages`."""


def vary(reward_PG: np.ndarray) -> np.ndarray:
    """Whether the rewards of each group differ, bool [P]. Unknown rewards (NaN) do not vary."""
    known_PG = ~np.isnan(reward_PG)
    count_P1 = np.maximum(known_PG.sum(axis=1, keepdims=True), 1)
    reward_PG = np.where(known_PG, reward_PG.astype(np.float64), 0.0)
    mean_P1 = reward_PG.sum(axis=1, keepdims=True) / count_P1
    with np.errstate(invalid="ignore"):  # infinite rewards: a guard's affair
        square_PG = np.where(known_PG, reward_PG - mean_P1, 0.0) ** 2
        equal_P = np.sqrt(square_PG.sum(axis=1) / count_P1[:, 0]) <= FLOOR
    return ~equal_P


def with_gradient(
    scores: Scores, group: int, *, each: bool = False, trained_PG: np.ndarray | None = None
) -> np.ndarray:
    """Whether each group of `group` completions has a policy gradient, bool [P].

    It has one if its rewards differ: their weighted sum, or with `each` at least one of them alone,
    for advantages that are computed from each reward (Liu et al. 2026, arXiv:2601.05242, "GDPO":
    the sums of different rewards can be equal). `trained_PG`: completions that the loss reads, such
    as those that were not truncated; a group without any has no gradient. None: all. Unknown
    completions (`Scores.unknown_B`) do not count.
    """
    unknown_B = scores.unknown_B
    if each:
        known = lambda x: np.where(unknown_B, np.nan, x).reshape(-1, group)  # noqa: E731
        varies_P = np.any([vary(known(x)) for x in scores.by_name.values()], axis=0)
    else:
        varies_P = vary(scores.reward_B.reshape(-1, group))
    if trained_PG is None:
        return varies_P
    return varies_P & (trained_PG & ~unknown_B.reshape(-1, group)).any(axis=1)
