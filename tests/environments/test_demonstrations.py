"""Demonstrations in the groups of a draw, by hand."""

from __future__ import annotations

import numpy as np

from grpo_jax.environments.demonstrations import NOTHING, Demonstrations, Hints, OneMore
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.rewards.scores import Scores
from grpo_jax.structs import Rollouts

# Two prompts with two completions each, of at most four tokens; the last one was cut.
DRAWN = Rollouts(
    prompt_PQ=np.array([[7, 8], [9, 0]], np.int32),
    prompt_length_P=np.array([2, 1], np.int32),
    completion_PGC=np.array([[[3, 1, 0, 0], [4, 5, 1, 0]], [[1, 0, 0, 0], [5, 6, 5, 6]]], np.int32),
    logp_PGC=np.array(
        [[[-1, -2, 0, 0], [-3, -4, -5, 0]], [[-6, 0, 0, 0], [-1, -1, -1, -1]]], np.float32
    ),
    length_PG=np.array([[2, 3], [1, 4]], np.int32),
    stopped_PG=np.array([[True, True], [True, False]]),
)
PROMPTS = [[7, 8], [9]]


def submitted(given) -> dict[int, list[list[int]]]:
    """What the rewards get of the engine's completions."""
    found = {}
    add = given.to(found.__setitem__)
    for p, (rows, lengths) in enumerate(zip(DRAWN.completion_PGC, DRAWN.length_PG)):
        add(p, [ids[:n].tolist() for ids, n in zip(rows, lengths)])
    return found


def test_a_demonstration_is_one_more_completion():
    given = OneMore(PROMPTS, [[5, 6, 1], []])
    assert given.prompt_ids == PROMPTS
    whole = given.joined(DRAWN)

    np.testing.assert_array_equal(whole.completion_PGC[:, :2], DRAWN.completion_PGC)
    np.testing.assert_array_equal(whole.completion_PGC[:, 2], [[5, 6, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(whole.length_PG, [[2, 3, 3], [1, 4, 1]])
    np.testing.assert_array_equal(whole.stopped_PG[:, 2], [True, True])
    assert not whole.logp_PGC[:, 2].any()
    assert not whole.given_PGC[:, :2].any()
    np.testing.assert_array_equal(whole.given_PGC[:, 2], [[1, 1, 1, 0], [1, 0, 0, 0]])
    # The problem without one: a place that is not trained on.
    np.testing.assert_array_equal(whole.chosen_PGC[:, 2], [[1, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(whole.num_trained_PG, [[2, 3, 3], [1, 4, 0]])
    assert submitted(given) == {0: [[3, 1], [4, 5, 1], [5, 6, 1]], 1: [[1], [5, 6, 5, 6], [0]]}


def test_a_hint_begins_each_completion_of_its_group():
    given = Hints([[7, 8, 2], [9]], PROMPTS, [[2, 3], []], limit=4)
    whole = given.joined(DRAWN.replace(prompt_PQ=np.zeros((2, 16), np.int32)))

    np.testing.assert_array_equal(whole.prompt_PQ[:, :2], DRAWN.prompt_PQ)
    np.testing.assert_array_equal(whole.prompt_length_P, [2, 1])
    np.testing.assert_array_equal(whole.completion_PGC[0], [[2, 3, 3, 1], [2, 3, 4, 5]])
    np.testing.assert_array_equal(whole.logp_PGC[0], [[0, 0, -1, -2], [0, 0, -3, -4]])
    np.testing.assert_array_equal(whole.length_PG, [[4, 4], [1, 4]])
    np.testing.assert_array_equal(whole.stopped_PG, [[True, False], [True, False]])  # one is cut
    np.testing.assert_array_equal(whole.given_PGC[0], [[1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(whole.completion_PGC[1], DRAWN.completion_PGC[1])
    assert not whole.given_PGC[1].any()
    assert submitted(given) == {0: [[2, 3, 3, 1], [2, 3, 4, 5]], 1: [[1], [5, 6, 5, 6]]}


def scores(reward) -> Scores:
    reward_B = np.float32(reward)
    none = {"r": np.zeros(len(reward_B), bool)}
    return Scores(reward_B, {"r": reward_B}, none, {"r": np.zeros(len(reward_B))})


def test_metrics_are_of_what_was_drawn():
    made = Demonstrations([[5, 6, 1], []], 0, 4)
    given = made.of([0, 1], step=0, number=0, prompt_ids=PROMPTS)
    sampled = Rollout(None, None, given.joined(DRAWN), 1.0)
    drawn, of_drawn = made.drawn(sampled, scores([0, 1, 9, 0, 0, 7]))

    np.testing.assert_array_equal(of_drawn.reward_B, [0, 1, 0, 0])
    np.testing.assert_array_equal(drawn.completions.length_PG, DRAWN.length_PG)
    np.testing.assert_array_equal(drawn.completions.stopped_PG, DRAWN.stopped_PG)
    assert made.metrics(sampled, scores([0, 1, 9, 0, 0, 7])) == {"hybrid/given_reward": 9.0}
    assert NOTHING.drawn(sampled, of_drawn) == (sampled, of_drawn)


def test_hints_follow_from_seed_step_and_draw():
    """Lengths are binomial; the stop token is never shown."""
    ids = [list(range(2, 12)) + [1]] * 400
    asked = [[7]] * 400
    made = Demonstrations(ids, 3, 16, hint_share={0: 0.8, 1: 0.3, 2: 0.0, 3: 1.0}.get)
    hints = {
        step: [len(h) for h in made.of(range(400), step, number=5, prompt_ids=asked).hint_P]
        for step in range(4)
    }
    assert abs(np.mean(hints[0]) - 8) < 0.3 and abs(np.var(hints[0]) - 1.6) < 0.5
    assert abs(np.mean(hints[1]) - 3) < 0.3
    assert set(hints[2]) == {0} and set(hints[3]) == {10}
    again = made.of(range(400), 0, number=5, prompt_ids=asked)
    assert [len(h) for h in again.hint_P] == hints[0]
    assert again.prompt_ids[0] == [7, *range(2, 2 + hints[0][0])]
    other = made.of(range(400), 0, number=6, prompt_ids=asked)
    assert [len(h) for h in other.hint_P] != hints[0]
