"""The weighted sum of rewards, by hand."""

import json

import numpy as np

from grpo_jax.rewards import scores as scores_lib
from grpo_jax.rewards.registry import Reward
from grpo_jax.rewards.scores import Failure, Scores

NAN = float("nan")


def rewards_of(on_failure, **weights):
    return [Reward(name, name, w, on_failure=on_failure) for name, w in weights.items()]


REWARDS = rewards_of("least", a=2.0, b=-1.0)


def scores(a, b, failed_a=None, failures=(), **more):
    by_name = {"a": np.array(a, np.float32), "b": np.array(b, np.float32)}
    failed = {"a": np.zeros(len(a), bool), "b": np.zeros(len(a), bool)}
    if failed_a:
        failed["a"] = np.array(failed_a)
    return Scores(
        reward_B=scores_lib.combine(REWARDS, by_name, failed),
        by_name=by_name,
        failed=failed,
        seconds={"a": np.ones(len(a)), "b": np.zeros(len(a))},
        failures=tuple(failures),
        **more,
    )


def test_the_sum_counts_missing_rewards_as_zero():
    # 2 * 3 - 0.5; None for a: -0.5; None for both: unknown; a failed, None for b: 0, not unknown
    got = scores([3, NAN, NAN, NAN], [0.5, 0.5, NAN, NAN], [False, False, False, True])
    np.testing.assert_array_equal(got.reward_B, np.array([5.5, -0.5, NAN, 0], np.float32))
    assert got.reward_B.dtype == np.float32


def test_rewards_by_function_add_up_to_the_sum():
    """A failed one counts as the least of its function, weighted at most 0; None stays unknown."""
    by_name = {"a": np.float32([1, NAN, -2, NAN]), "b": np.float32([NAN, 3, 4, NAN])}
    failed = {"a": np.array([0, 1, 0, 0], bool), "b": np.array([0, 0, 0, 1], bool)}
    given = Scores(np.zeros(4, np.float32), by_name, failed, {})
    for weights, least in (((2.0, 1.0), (-2, 0)), ((1.0, -0.5), (-2, 4)), ((0.0, 0.0), (0, 0))):
        rewards = rewards_of("least", **dict(zip("ab", weights)))
        got = scores_lib.by_function(rewards, given)
        want = [[1, NAN], [least[0], 3], [-2, 4], [NAN, least[1]]]
        np.testing.assert_array_equal(got, np.float32(want))
        total = np.nansum(got.astype(np.float64) * weights, axis=1)
        np.testing.assert_array_equal(scores_lib.combine(rewards, by_name, failed), total)


def test_a_failure_is_worth_no_more_than_what_others_got():
    """The least that the function gave another, weighted, and at most 0."""
    failed = [False, False, True]
    gain = lambda a: scores_lib.combine(  # noqa: E731
        rewards_of("least", a=2.0), {"a": np.array(a, np.float32)}, {"a": np.array(failed)}
    )
    np.testing.assert_array_equal(gain([1, 0.5, NAN]), [2, 1, 0])  # as a wrong answer
    np.testing.assert_array_equal(gain([-1, 0, NAN]), [-2, 0, -2])  # a penalty, as the worst
    np.testing.assert_array_equal(gain([-1, NAN, NAN]), np.array([-2, NAN, -2], np.float32))
    np.testing.assert_array_equal(gain([NAN, NAN, NAN])[2], 0)
    # With a weight below 0 what is worst is the largest: b of 0.5 and 3 counts -0.5 and -3.
    got = scores([0, 0, 0], [0.5, 3, NAN])
    got.failed["b"][2] = True
    np.testing.assert_array_equal(
        scores_lib.combine(REWARDS, got.by_name, got.failed), [-0.5, -3, -3]
    )


def test_accuracy_counts_failures_and_leaves_out_none():
    got = scores([1, 0, NAN, NAN], [0, 0, 0, 0], [False, False, False, True])
    assert got.accuracy("a") == 1 / 3  # one right, one wrong, one failed
    assert scores([2, 0.5, 0, 1], [0] * 4).accuracy("a") == 0.5  # a share, not a mean
    np.testing.assert_array_equal(got.correct("a"), [True, False, False, False])
    assert np.isnan(scores([NAN], [1]).accuracy("a"))


def test_an_unknown_failure_takes_the_whole_completion_out():
    """a failed in row 1, b in row 3; None does not make a completion unknown."""
    by_name = {"a": np.float32([1, NAN, -2, 5, NAN]), "b": np.float32([NAN, 3, 4, NAN, NAN])}
    failed = {"a": np.array([0, 1, 0, 0, 0], bool), "b": np.array([0, 0, 0, 1, 0], bool)}
    rewards = rewards_of("unknown", a=2.0, b=-1.0)
    total_B = scores_lib.combine(rewards, by_name, failed)
    np.testing.assert_array_equal(total_B, np.float32([2, NAN, -8, NAN, NAN]))
    got = Scores(total_B, by_name, failed, {})
    assert got.unknown_B.tolist() == [False, True, False, True, False]
    np.testing.assert_array_equal(
        scores_lib.by_function(rewards, got),
        np.float32([[1, NAN], [NAN, NAN], [-2, 4], [NAN, NAN], [NAN, NAN]]),
    )
    # Right: row 0 of rows 0, 2 and 3, as row 1 is unknown; an evaluation counts it as wrong.
    assert got.accuracy("a") == 2 / 3 and got.judged("a").sum() == 4
    least = Scores(scores_lib.combine(REWARDS, by_name, failed), by_name, failed, {})
    assert not least.unknown_B.any() and least.accuracy("a") == 2 / 4


def test_what_no_reward_function_tells_leaves_a_completion_out():
    """As an environment does with an episode that broke, whatever rewards.on_failure says."""
    before = scores([1, 2, 3], [0, 0, 0])
    got = scores_lib.left_out(before, "episode", {1: "The server was gone."})
    np.testing.assert_array_equal(got.reward_B, np.float32([2, NAN, 6]))
    assert got.unknown_B.tolist() == [False, True, False] and got.num_failed("invalid") == 1
    assert got.broken(0.3) == {
        "episode": "1 of 3 completions have no reward 'episode', more than "
        "rewards.max_failed_share = 0.3. The first: The server was gone."
    }
    for joined in (scores_lib.join([before, got], REWARDS), Scores.from_json(got.as_json())):
        assert joined.unknown_B[-3:].tolist() == [False, True, False]
        assert np.isnan(joined.reward_B).sum() == 1
    model = scores_lib.with_models(
        got, [*REWARDS, Reward("m", "model:m", 1.0)], {"m": np.ones(3, np.float32)}, 1.0
    )
    np.testing.assert_array_equal(model.reward_B, np.float32([3, NAN, 7]))


def test_join_keeps_rows_in_order():
    fail = Failure("a", 0, "timeout", "slow")
    one = scores([1], [2], metrics={"m": (3.0, 1)}, extras={"x": ["u"]}, retried={"a": (1, "A")})
    two = scores([NAN, 4], [5, 6], [True, False], [fail], metrics={"m": (1.0, 2), "n": (1.0, 1)})
    got = scores_lib.join([one, two], REWARDS)
    np.testing.assert_array_equal(got.reward_B, [0, -5, 2])
    assert got.retried == {"a": (1, "A")}
    # What failed is worth the least of all parts.
    three = scores([-4], [0])
    np.testing.assert_array_equal(
        scores_lib.join([two, three], REWARDS).reward_B, [-8 - 5, 8 - 6, -8]
    )
    np.testing.assert_array_equal(got.by_name["a"], [1, NAN, 4])
    np.testing.assert_array_equal(got.failed["a"], [False, True, False])
    np.testing.assert_array_equal(got.seconds["a"], [1, 1, 1])
    assert got.failures == (Failure("a", 1, "timeout", "slow"),)
    assert got.num_failed("timeout") == 1 and got.num_failed("error") == 0
    assert got.metrics == {"m": (4.0, 3), "n": (1.0, 1)}
    assert got.extras == {"x": ["u", None, None]}


def test_scores_pass_between_processes_as_they_are():
    """Through JSON: thirds in float32, NaN, what failed, and what functions added."""
    third = np.array([1 / 3, np.nan], np.float32)
    told = Scores(
        reward_B=third,
        by_name={"a": third, "b": np.zeros(2, np.float32)},
        failed={"a": np.array([False, True]), "b": np.zeros(2, bool)},
        seconds={"a": np.array([0.1, 0.2]), "b": np.zeros(2)},
        failures=(Failure("a", 1, "timeout", "too slow"),),
        metrics={"m": (1.5, 2)},
        extras={"note": ["x", 3]},
        retried={"a": (2, "It raised.")},
    )
    got = Scores.from_json(json.loads(json.dumps(told.as_json())))
    np.testing.assert_array_equal(got.reward_B, third)
    assert got.reward_B.dtype == np.float32
    for name in ("by_name", "failed", "seconds"):
        for n, value_B in getattr(told, name).items():
            np.testing.assert_array_equal(getattr(got, name)[n], value_B)
            assert getattr(got, name)[n].dtype == value_B.dtype
    assert (got.failures, got.metrics, got.extras, got.retried) == (
        told.failures,
        told.metrics,
        told.extras,
        told.retried,
    )


def test_selected_rows_keep_the_values_of_their_batch():
    """A failed reward counts as the least of its batch, -2 and 0 here, whatever rows are left."""
    failed = [False, False, True]
    first = scores([-1, 2, NAN], [0, 0, 0], failed, [Failure("a", 2, "error", "x")],
                   metrics={"m": (3.0, 2)}, extras={"n": ["p", "q", "r"]})  # fmt: skip
    second = scores([5, 6, NAN], [1, 0, 0], failed, [Failure("a", 2, "died", "y")],
                    metrics={"m": (1.0, 1)}, retried={"a": (1, "z")})  # fmt: skip
    got = scores_lib.select([(first, np.array([2, 1])), (second, np.array([0, 2]))])
    assert got.reward_B.tolist() == [-2, 4, 9, 0]
    np.testing.assert_array_equal(got.by_name["a"], np.float32([NAN, 2, 5, NAN]))
    assert got.failed["a"].tolist() == [True, False, False, True]
    assert [(f.row, f.kind) for f in got.failures] == [(0, "error"), (3, "died")]
    assert got.extras == {"n": ["r", "q", None, None]}
    assert (got.metrics, got.retried) == ({"m": (4.0, 3)}, {"a": (1, "z")})
    # As one batch the least is -2 for both.
    joined = scores_lib.join([first, second], REWARDS)
    assert joined.reward_B.tolist() == [-2, 4, -2, 9, 12, -2]
