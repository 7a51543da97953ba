"""Which training problems a draw asks, and what their rewards tell about them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.data import prompts
from grpo_jax.data.pass_rates import PassRates, Preference
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.rewards.scores import Scores
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run


def problems(run: Run, state: RunState, number: int) -> np.ndarray:
    """The numbers of the training problems of a draw, int64 [P].

    They follow from the seed, the number of the draw, and the state's pass rates if these count.
    """
    config, num_problems = run.config, len(run.train.problems)
    per_draw = derived.prompts_begun(config)
    if derived.follows_pass_rates(config):
        rates = state.pass_rates or PassRates.unseen(num_problems)
        return _preference(config).draw(rates, config.seed, number, per_draw)
    asked = num_problems * config.data.repeat
    return prompts.prompt_indices(config.seed, number, asked, per_draw) % num_problems


def measure(run: Run, state: RunState, sampled: Rollout, scores: Scores) -> dict[str, float]:
    """Adds a step's groups to the state's pass rates, if these count; returns their metrics.

    `scores`: of the completions that are learned from. If others were sampled too, all count.
    """
    config = run.config
    if not derived.follows_pass_rates(config):
        return {}
    problem_P: Sequence[int] = sampled.problem_P
    if sampled.draws is not None:
        problem_P, scores = sampled.draws.problem_N, sampled.draws.scores
    before = state.pass_rates or PassRates.unseen(len(run.train.problems))
    value_P = _pass_rate(run, scores, len(problem_P))
    state.pass_rates = rates = before.after(problem_P, value_P, config.prompts.newest_share)
    low, high = config.prompts.low_rate, config.prompts.high_rate
    return {
        "prompts/unseen_share": float((~rates.is_seen_N).mean()),
        "prompts/easy_share": float(rates.easy_N(high).mean()),
        "prompts/hard_share": float(rates.hard_N(low).mean()),
        "prompts/replayed_share": float(before.easy_N(high)[problem_P].mean()),
    }


def _pass_rate(run: Run, scores: Scores, num_groups: int) -> np.ndarray:
    """The mean accuracy of each group, or its mean reward; NaN if nothing is known, [P]."""
    value_B = scores.reward_B.astype(np.float64)
    if (name := run.rewards.accuracy) is not None:
        value_B = np.where(scores.known(name), scores.correct(name), np.nan)
    value_PG = value_B.reshape(num_groups, -1)
    known_PG = ~np.isnan(value_PG)
    count_P = known_PG.sum(axis=1)
    total_P = np.where(known_PG, value_PG, 0.0).sum(axis=1)
    return np.where(count_P > 0, total_P / np.maximum(count_P, 1), np.nan)


def _preference(config: ConfigDict) -> Preference:
    asked = config.prompts
    return Preference(asked.low_rate, asked.high_rate, asked.outside_weight, asked.replay_share)
