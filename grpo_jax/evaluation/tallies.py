"""Metrics of an evaluation: accuracy, rewards, lengths, pass@k, pass^k and maj@k."""

from __future__ import annotations

import numpy as np

from grpo_jax.environments.single_turn import Answered
from grpo_jax.evaluation import estimates
from grpo_jax.evaluation.estimates import Tally


def greedy_tallies(answered: Answered, max_tokens: int) -> dict[str, Tally]:
    """Metrics of one greedy completion per problem, by name."""
    length_PG, stopped_PG = answered.length_PG, answered.stopped_PG
    found_PG = np.array([a is not None for a in answered.answers]).reshape(length_PG.shape)
    limit = float(max_tokens)
    tallies = {}
    if answered.correct_PG is not None:
        judged_P = answered.judged_PG.sum(axis=1)
        tallies["accuracy"] = estimates.ratio(answered.correct_PG.sum(axis=1), judged_P)
    tallies["reward"] = _mean(answered.scores.reward_B.reshape(length_PG.shape))
    for name, value_B in answered.scores.by_name.items():
        tallies[f"reward/{name}"] = _mean(value_B.reshape(length_PG.shape))
    return tallies | {
        "answer_found_share": estimates.mean(found_PG.mean(axis=1)),
        "truncated_share": estimates.mean(1 - stopped_PG.mean(axis=1)),
        "length": estimates.mean(length_PG.mean(axis=1), 1.0, limit),
        "stopped_length": estimates.ratio(
            (length_PG * stopped_PG).sum(axis=1), stopped_PG.sum(axis=1), 1.0, limit
        ),
    }


def _mean(value_PG: np.ndarray) -> Tally:
    """The mean of the rewards that are not NaN; its range is at least [0, 1]."""
    known_PG = ~np.isnan(value_PG)
    value_PG = np.where(known_PG, value_PG, 0.0).astype(np.float64)
    low, high = min(0.0, value_PG.min()), max(1.0, value_PG.max())
    return estimates.ratio(value_PG.sum(axis=1), known_PG.sum(axis=1), low, high)


def sampled_tallies(answered: Answered, ks: list[int]) -> dict[str, Tally]:
    """pass@k, pass^k and maj@k for each k, and the mean accuracy, of several samples per problem.

    There is no maj@k if the reward compares no answers. A completion to which the reward does not
    apply counts as wrong.
    """
    correct_PG, vote_PG = answered.correct_PG, answered.vote_PG
    n = correct_PG.shape[1]
    values = {f"pass@{k}": estimates.pass_at_k(correct_PG.sum(axis=1), n, k) for k in ks}
    right_P = correct_PG.sum(axis=1)
    values |= {f"pass^{k}": estimates.pass_all_k(right_P, n, k) for k in ks if k > 1}
    if vote_PG is not None:
        values |= {f"maj@{k}": estimates.maj_at_k(vote_PG, correct_PG, k) for k in ks}
    values[f"mean@{n}"] = correct_PG.mean(axis=1)
    return {name: estimates.mean(value_P) for name, value_P in values.items()}
