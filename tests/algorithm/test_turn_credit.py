"""Advantages of turns, by hand."""

from __future__ import annotations

import numpy as np

from grpo_jax.algorithm.turn_credit import by_token, rewards_to_go, turn_advantages

nan = np.nan
# Two episodes: one of three turns that earns 1 by its second turn and 2 at its end, and one of one.
TURN_PGU = np.array([[[0.0, 1, 0], [0, 0, 0]]])
TAKEN_PGU = np.array([[[True, True, True], [True, False, False]]])


def test_rewards_to_go_leave_out_what_was_earned_before():
    got = rewards_to_go(np.array([[2 + 0.5, 4.0]]), TURN_PGU, 0.5)
    assert got.tolist() == [[[2.5, 2.5, 2.0], [4.0, 4.0, 4.0]]]


def test_turns_are_compared_with_all_turns_of_the_group():
    to_go = np.array([[[3.0, 3, 2], [4, 9, 9]]])  # of those taken: 3, 3, 2, 4
    want = np.array([[[0, 0, -1], [1, 0, 0]]])
    assert turn_advantages(to_go, TAKEN_PGU, scales=False).tolist() == want.tolist()
    np.testing.assert_allclose(turn_advantages(to_go, TAKEN_PGU), want / np.sqrt(0.5), rtol=1e-12)
    equal = np.full((1, 2, 3), 3.0)
    assert not turn_advantages(equal, TAKEN_PGU).any()


def test_an_unknown_episode_leaves_the_others():
    to_go = np.array([[[nan] * 3, [4, 9, 9], [2, 6, 9]]])
    taken = np.array([[[True] * 3, [True, False, False], [True, True, False]]])
    got = turn_advantages(to_go, taken, scales=False)
    assert got.tolist() == [[[0, 0, 0], [0, 0, 0], [-2, 2, 0]]]


def test_tokens_have_the_advantage_of_their_turn():
    """Turns end after 2, 5 and 6 tokens; the third token is the environment's."""
    end = np.array([[[2, 5, 6], [3, 6, 6]]])
    got = by_token(np.array([[[1.0, 2, 3], [7, 0, 0]]]), end, 6)
    assert got.tolist() == [[[1, 1, 2, 2, 2, 3], [7, 7, 7, 0, 0, 0]]]
