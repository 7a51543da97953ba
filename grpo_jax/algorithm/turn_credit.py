"""Advantages of turns and of steps: what a completion still earned from each of them on.

In place of one advantage for all of an episode's tokens, each turn of the policy has its own: the
reward to go, relative to those of all turns of the group. It is the turn-level estimate of Zeng et
al. 2025, arXiv:2505.11821, with rewards that follow a turn credited to it and to those before.

Steps of a chain of thought are rewarded each by itself, relative to all steps of the group. A token
has the sum over the steps that end at it or later: the process supervision of Shao et al. 2024,
arXiv:2402.03300, section 4.1.3.

Beside the axes of `structs.py`, U are turns of an episode, or steps of a completion.
"""

from __future__ import annotations

import numpy as np

EPS = 1e-4  # deviations up to this are of equal rewards, as in `advantages`


def rewards_to_go(
    reward_PG: np.ndarray, turn_reward_PGU: np.ndarray, weight: float = 1.0
) -> np.ndarray:
    """What an episode earned from each turn on, [P, G, U].

    `reward_PG`: the whole reward, the sum of `turn_reward_PGU` times `weight` included.
    """
    before_PGU = np.cumsum(turn_reward_PGU, axis=2) - turn_reward_PGU
    return reward_PG[..., None] - weight * before_PGU


def turn_advantages(
    to_go_PGU: np.ndarray, taken_PGU: np.ndarray, *, scales: bool = True
) -> np.ndarray:
    """Rewards to go minus their mean over the group's turns, over their deviation; [P, G, U].

    `taken_PGU`: turns that there were. Turns of an episode whose reward is NaN are left out of the
    mean and the deviation, and have an advantage of 0. `scales`: divide by the deviation.
    """
    known_PGU = taken_PGU & ~np.isnan(to_go_PGU)
    count_P11 = np.maximum(known_PGU.sum((1, 2), keepdims=True), 1)
    value_PGU = np.where(known_PGU, to_go_PGU, 0)
    mean_P11 = value_PGU.sum((1, 2), keepdims=True) / count_P11
    centred_PGU = np.where(known_PGU, to_go_PGU - mean_P11, 0)
    if not scales:
        return centred_PGU
    std_P11 = np.sqrt((centred_PGU**2).sum((1, 2), keepdims=True) / count_P11)
    return np.where(std_P11 > EPS, centred_PGU / np.maximum(std_P11, EPS), 0.0)


def step_advantages(
    value_PGU: np.ndarray, there_PGU: np.ndarray, *, scales: bool = True
) -> np.ndarray:
    """What the steps of a completion earn from each on, [P, G, U + 1]; after the last step 0.

    `value_PGU`: rewards of steps; `there_PGU`: steps that there are. Each counts relative to the
    mean of all steps of its group, and with `scales` in their deviations.
    """
    relative_PGU = turn_advantages(value_PGU, there_PGU, scales=scales)
    to_go_PGU = np.cumsum(relative_PGU[..., ::-1], axis=2)[..., ::-1]
    return np.pad(to_go_PGU, ((0, 0), (0, 0), (0, 1)))


def by_token(advantage_PGU: np.ndarray, end_PGU: np.ndarray, tokens: int) -> np.ndarray:
    """The advantage of each token: that of the turn or step which it is in; [P, G, tokens].

    `end_PGU`: where turns end, in tokens of the completion. What the environment says after a turn
    has the advantage of the next one, and is no action.
    """
    place_1111 = np.arange(tokens)[None, None, None]
    turn_PGC = (place_1111 >= end_PGU[..., None]).sum(2)
    last = advantage_PGU.shape[2] - 1
    return np.take_along_axis(advantage_PGU, np.minimum(turn_PGC, last), axis=2)
