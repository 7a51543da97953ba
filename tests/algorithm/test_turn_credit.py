"""Advantages of turns and of steps, by hand and beside the formulas written out."""

from __future__ import annotations

import numpy as np

from grpo_jax.algorithm.turn_credit import (
    by_token,
    rewards_to_go,
    step_advantages,
    turn_advantages,
)

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


def test_a_token_has_what_the_steps_from_it_on_are_worth():
    """The process supervision of arXiv:2402.03300, section 4.1.3, written out in float64."""
    rng, tokens = np.random.default_rng(0), 12
    for _ in range(20):
        chains = [
            sorted(rng.choice(np.arange(1, tokens + 1), rng.integers(0, 4), replace=False))
            for _ in range(3)
        ]
        values = [rng.normal(size=len(ends)) for ends in chains]
        every = np.concatenate(values)  # of the group
        want = np.zeros((3, tokens))
        for i, (ends, rewards) in enumerate(zip(chains, values)):
            for t in range(tokens):
                for index, reward in zip(ends, rewards):
                    if index > t and len(every) > 1:  # the step ends at token t or later
                        want[i, t] += (reward - every.mean()) / every.std()
        width = max(1, *map(len, chains))
        pad = lambda rows, fill: np.array([[[*row, *[fill] * (width - len(row))] for row in rows]])  # noqa: E731, B023
        there = pad([[True] * len(ends) for ends in chains], False)
        step_PGU = step_advantages(pad(values, 0.0), there)
        got = by_token(step_PGU, pad(chains, tokens), tokens)
        np.testing.assert_allclose(got[0], want, atol=1e-12)
    there = np.array([[[True, True], [True, False]]])
    plain = step_advantages(np.array([[[1.0, 0], [1, 9]]]), there, scales=False)
    np.testing.assert_allclose(plain * 3, [[[-1, -2, 0], [1, 0, 0]]])  # less a mean of 2/3
