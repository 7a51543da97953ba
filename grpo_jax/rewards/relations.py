"""How rewards relate to each other, to length, and to labels that people gave."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from grpo_jax.rewards.scores import Scores

_LEAST = 3  # rows of which a correlation is computed


def correlation(one_B: np.ndarray, other_B: np.ndarray) -> float:
    """Pearson's correlation over the rows where both are known; NaN if there is none.

    There is none for fewer than three rows, or where one of the two does not vary.
    """
    one_B, other_B = np.asarray(one_B, np.float64), np.asarray(other_B, np.float64)
    known_B = np.isfinite(one_B) & np.isfinite(other_B)
    if known_B.sum() < _LEAST:
        return float("nan")
    one, other = one_B[known_B], other_B[known_B]
    one, other = one - one.mean(), other - other.mean()
    size = np.sqrt((one**2).sum() * (other**2).sum())
    # A constant minus its mean rounds to about 1e-17 of it.
    tiny = 1e-12 * len(one) * max(np.abs(one_B[known_B]).max() * np.abs(other_B[known_B]).max(), 1)
    return float((one * other).sum() / size) if size > tiny else float("nan")


def correlations(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The correlations of all pairs of columns [B], float64 [M, M]; NaN where there is none."""
    columns = list(values.values())
    return np.array([[correlation(one, other) for other in columns] for one in columns])


def shares_at_bounds(value_B: np.ndarray) -> tuple[float, float]:
    """Shares of the known values that equal the least and the largest of them; NaN without any.

    A reward that is nearly always at one of its bounds tells completions apart no more.
    """
    known = value_B[np.isfinite(value_B)]
    if not len(known):
        return float("nan"), float("nan")
    return float((known == known.min()).mean()), float((known == known.max()).mean())


def metrics(scores: Scores, names: Sequence[str], length_B: np.ndarray) -> dict[str, float]:
    """Metrics of a step about the members of ensembles, without those that do not exist.

    `length_B`: of the completions, tokens.
    """
    found: dict[str, float] = {}
    for name in names:
        value_B = scores.by_name[name]
        low, high = shares_at_bounds(value_B)
        found[f"ensemble/low_share/{name}"] = low
        found[f"ensemble/high_share/{name}"] = high
        found[f"ensemble/length_correlation/{name}"] = correlation(value_B, length_B)
    for one, other in itertools.combinations(names, 2):
        value = correlation(scores.by_name[one], scores.by_name[other])
        found[f"ensemble/correlation/{one}/{other}"] = value
    return {name: value for name, value in found.items() if not np.isnan(value)}


def kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Cohen's kappa of two lists of labels: agreement beyond chance (Cohen 1960).

    1 for equal labels, 0 for what chance gives, NaN if chance alone gives full agreement. Raises
    ValueError for lists of different lengths, or without labels.
    """
    if len(one) != len(other) or not one:
        raise ValueError(f"kappa needs as many labels of both, not {len(one)} and {len(other)}.")
    agreed = sum(a == b for a, b in zip(one, other)) / len(one)
    by_chance = sum(
        one.count(label) / len(one) * other.count(label) / len(other) for label in {*one, *other}
    )
    return (agreed - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan")


def agreement(value_B: np.ndarray, label_B: Sequence[bool]) -> tuple[float, float, float]:
    """Kappa, the share that agrees, and the threshold, of a reward with labels of people.

    A reward of 0 and 1 alone is compared as it is: good is 1, so that the threshold is 1. Another
    is good from the threshold on that gives the largest kappa, which flatters it for few labels.
    Rows without a value do not count. NaN if no row is left.
    """
    known_B = np.isfinite(value_B)
    value, label = value_B[known_B], [bool(x) for x, k in zip(label_B, known_B) if k]
    if not len(value):
        return float("nan"), float("nan"), float("nan")
    levels = np.unique(value)
    if set(levels.tolist()) <= {0.0, 1.0}:
        thresholds = [1.0]
    else:  # between neighbours; at most 200, evenly in rank
        thresholds = levels[np.unique(np.linspace(0, len(levels) - 1, 200).astype(int))].tolist()
    best = (float("nan"), float("nan"), float("nan"))
    for threshold in thresholds:
        good = [bool(v >= threshold) for v in value]
        found = kappa(good, label)
        if np.isnan(best[2]) or (not np.isnan(found) and not found <= best[0]):
            share = sum(a == b for a, b in zip(good, label)) / len(label)
            best = found, share, float(threshold)
    return best
