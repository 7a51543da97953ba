"""Which groups have a gradient, against the advantages themselves."""

import numpy as np
import pytest

from grpo_jax.algorithm.advantages import group_advantages
from grpo_jax.rewards import groups
from grpo_jax.rewards.scores import Scores

NAN = float("nan")
REWARDS = [
    ([1, 1, 1, 1], False),
    ([0.1, 0.1, 0.1, 0.1], False),  # whose mean rounds
    ([1, 0, 0, 0], True),
    ([NAN, NAN, NAN, NAN], False),
    ([NAN, 1, 1, NAN], False),  # unknown rewards do not vary
    ([NAN, 1, 0, NAN], True),
    ([0, 0, 0, 2e-4], False),  # a deviation of 8.7e-5, which "std" takes for rounding
    ([0, 0, 0, 3e-4], True),  # 1.3e-4
]


@pytest.mark.parametrize(("reward_G", "varies"), REWARDS)
def test_a_group_varies_where_its_advantages_do(reward_G, varies):
    reward_PG = np.float32([reward_G])
    assert groups.vary(reward_PG).tolist() == [varies]
    assert bool(np.any(group_advantages(reward_PG, scale_by="std"))) == varies


def _scores(**by_name) -> Scores:
    by_name = {name: np.float32(value).ravel() for name, value in by_name.items()}
    return Scores(sum(by_name.values()), by_name, {}, {})


def test_a_group_counts_whose_rewards_vary_alone_and_not_in_their_sum():
    # Sums of the groups: 1 1, 1 1, 2 1; in the first the two rewards cancel.
    scores = _scores(a=[[1, 0], [1, 1], [1, 0]], b=[[0, 1], [0, 0], [1, 1]])
    assert groups.with_gradient(scores, 2).tolist() == [False, False, True]
    assert groups.with_gradient(scores, 2, each=True).tolist() == [True, False, True]


def test_an_unknown_completion_varies_from_nothing():
    """With `each` too, where a reward beside the failed one has a value."""
    scores = _scores(a=[[1, 0, 1], [1, 0, 1], [1, 1, 0]], b=[[0, NAN, 0], [0, 0, 0], [0, 0, 0]])
    failed_B = np.arange(9) == 1
    for each in (False, True):
        # The second differs in its first group, and fails.
        scores.failed["b"] = failed_B
        assert scores.unknown_B.tolist() == failed_B.tolist()
        found = groups.with_gradient(scores, 3, each=each)
        assert found.tolist() == [False, True, True]
    # Of the third group the loss reads its last completion alone, which now is unknown.
    trained_PG = np.array([[True] * 3, [True] * 3, [False, False, True]])
    assert groups.with_gradient(scores, 3, trained_PG=trained_PG).tolist() == [False, True, True]
    scores.failed["a"], scores.reward_B[8] = np.arange(9) == 8, NAN
    scores.reward_B[6] = 0
    assert groups.with_gradient(scores, 3, trained_PG=trained_PG).tolist() == [False, True, False]


def test_a_group_that_the_loss_does_not_read_has_no_gradient():
    scores = _scores(a=[[1, 0], [1, 0], [0, 0]])
    trained_PG = np.array([[True, False], [False, False], [True, True]])
    found = groups.with_gradient(scores, 2, trained_PG=trained_PG)
    assert found.tolist() == [True, False, False]
