"""Advantages of a step's tokens, where turns or steps of a completion have their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_jax.algorithm import turn_credit
from grpo_jax.devices import transfer
from grpo_jax.environments.rewarding import TURN_REWARDS
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.rewards.scores import Scores
from grpo_jax.structs import Array
from grpo_jax.trainers import rollout
from grpo_jax.trainers.runs import Run


def by_token(run: Run, sampled: Rollout, scores: Scores) -> dict[str, Array]:
    """Advantages of tokens, [P, G, C], as a field of the experience; {} if completions have one."""
    if run.config.environment.turn_rewards:
        advantage_PGC = _of_turns(run, sampled, scores)
    elif run.config.rewards.by_step:
        advantage_PGC = _of_steps(run, sampled, scores)
    else:
        return {}
    return {"advantage": transfer.shard_rows(run.mesh, advantage_PGC.astype(np.float32))}


def _of_turns(run: Run, sampled: Rollout, scores: Scores) -> np.ndarray:
    (told,) = sampled.told
    shape, tokens = sampled.completions.length_PG.shape, rollout.cut_length(sampled.completions)
    end_PGU = _padded(told.ends, shape, tokens)
    weight = next(r.weight for r in run.rewards.rewards if r.spec == TURN_REWARDS)
    to_go_PGU = turn_credit.rewards_to_go(
        scores.reward_B.astype(np.float64).reshape(shape),
        _padded(told.turn_rewards, shape, 0.0, end_PGU.shape[2]),
        weight,
    )
    taken_PGU = _padded([[True] * len(row) for row in told.ends], shape, False)
    advantage_PGU = turn_credit.turn_advantages(to_go_PGU, taken_PGU, scales=_scales(run))
    return turn_credit.by_token(advantage_PGU, end_PGU, tokens)


def _of_steps(run: Run, sampled: Rollout, scores: Scores) -> np.ndarray:
    """Of each token the advantage of its completion by the rewards that tell of no steps.

    To it, times the weight of each that does, what the steps from the token on are worth.
    """
    shape, tokens = sampled.completions.length_PG.shape, rollout.cut_length(sampled.completions)
    reward_B, advantage_PGC = scores.reward_B.astype(np.float64), 0.0
    for reward in (r for r in run.rewards.rewards if r.by_step):
        value_B = np.nan_to_num(scores.by_name[reward.name].astype(np.float64))
        reward_B = reward_B - reward.weight * value_B
        # Steps of what is left out, or failed, tell nothing.
        left_B = np.isnan(scores.reward_B) | scores.failed[reward.name]
        rows = scores.steps.get(reward.name, [None] * len(left_B))
        known = [[] if is_left else row or [] for row, is_left in zip(rows, left_B)]
        value_PGU = _padded([[value for _, value in steps] for steps in known], shape, 0.0)
        there_PGU = _padded([[True] * len(steps) for steps in known], shape, False)
        end_PGU = _padded([[end for end, _ in steps] for steps in known], shape, tokens)
        step_PGU = turn_credit.step_advantages(value_PGU, there_PGU, scales=_scales(run))
        spread_PGC = turn_credit.by_token(step_PGU, end_PGU, tokens)
        advantage_PGC = advantage_PGC + reward.weight * spread_PGC
    rest_PG1 = reward_B.reshape(*shape, 1)
    whole_PG1 = turn_credit.turn_advantages(rest_PG1, ~np.isnan(rest_PG1), scales=_scales(run))
    return advantage_PGC + whole_PG1


def _scales(run: Run) -> bool:
    return run.config.algorithm.scale_by == "std"


def _padded(rows: Sequence[Sequence], shape: tuple[int, int], fill: float, least: int = 1):
    """Rows of completions as an array [P, G, U], filled up at their ends."""
    most = max(least, *map(len, rows))
    return np.array([[*row, *[fill] * (most - len(row))] for row in rows]).reshape(*shape, most)
