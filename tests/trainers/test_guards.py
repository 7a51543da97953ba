"""What each guard finds and does, by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from grpo_jax.config import derived, guard_rules
from grpo_jax.config import options as options_lib
from grpo_jax.rewards.scores import Failure, RewardError, Scores
from grpo_jax.trainers.guards import Diverged, Guards, History, RollBack


def _config(**options):
    config = options_lib.default()
    assert config.rewards.max_failed_share == 0.5
    config.guards.update({"window": 2, "equal_groups_steps": 2} | options)
    return config


def _guards(history=None, **options) -> Guards:
    config = _config(**options)
    updates = derived.num_updates_per_step(config)
    return Guards(config, history or History(), "DIR/checkpoints", updates_per_step=updates)


def _update(loss=0.1, grad_norm=1.0, kl=0.1, entropy=1.0) -> dict[str, float]:
    return {
        "policy/loss": loss,
        "policy/grad_norm": grad_norm,
        "policy/kl": kl,
        "policy/entropy": entropy,
    }


def _rollout(guards: Guards, step: int, reward: float | None, equal: float = 0.0) -> bool:
    known = {} if reward is None else {"reward": reward, "reward/f": reward}
    guards.skips_rollout = False
    guards.check_rollout(step, known | {"groups/equal_share": equal})
    return guards.skips_rollout


def _scores(num_failed: int, of: int = 4) -> Scores:
    failed_B = np.arange(of) < num_failed
    return Scores(
        reward_B=np.zeros(of, np.float32),
        by_name={"f": np.zeros(of, np.float32)},
        failed={"f": failed_B},
        seconds={"f": np.zeros(of)},
        failures=tuple(Failure("f", i, "values", "It gave nan.") for i in range(num_failed)),
    )


# --- What is out of bounds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "parts"),
    [
        ({"kl": 0.7}, {"kl_max": 0.5}, ("policy/kl is 0.7 nats/token, above guards.kl_max = 0.5",)),
        ({"entropy": 0.01}, {"entropy_min": 0.02}, ("policy/entropy is 0.01", "below", "_min")),
        ({"entropy": 3.0}, {"entropy_max": 2.5}, ("policy/entropy is 3", "above", "_max = 2.5")),
        ({"loss": math.nan}, {}, ("the loss is nan and the norm of its gradient 1",)),
        ({"grad_norm": math.inf}, {}, ("the loss is 0.1 and the norm of its gradient inf",)),
    ],
)  # fmt: skip
def test_an_update_out_of_bounds(values, options, parts):
    guard = "nonfinite" if not options else next(iter(options)).split("_")[0]
    guards = _guards(**options, **{guard: "stop"})
    guards.check_update(6, _update(), refused=False)
    guards.enforce()
    guards.check_update(7, _update(**values), refused=False)
    with pytest.raises(Diverged) as info:
        guards.enforce()
    told = str(info.value)
    for part in ("Step 7", f'guards.{guard} = "stop"', "DIR/checkpoints holds the last", *parts):
        assert part in told, told


@pytest.mark.parametrize("values", [{"kl": 0.5}, {"entropy": 0.02}, {"entropy": 2.5}])
def test_a_bound_itself_is_not_out_of_bounds(values):
    """As the device has it, in float32, where 0.02 is 0.0199999996."""
    guards = _guards(kl_max=0.5, entropy_min=0.02, entropy_max=2.5, kl="stop", entropy="stop")
    on_device = {name: float(np.float32(value)) for name, value in values.items()}
    guards.check_update(1, _update(**on_device), refused=False)
    guards.enforce()


def test_without_bounds_nothing_is_out_of_them():
    guards = _guards(kl="stop", entropy="stop")
    guards.check_update(1, _update(kl=1e9, entropy=0.0), refused=False)
    guards.enforce()


@pytest.mark.parametrize(
    ("rewards", "falls_at"),
    [
        # Means of two: 0.8, 1.0, 0.7, 0.45: below half of the best, 0.5.
        ((0.8, 0.8, 1.2, 0.2, 0.7), 5),
        ((0.8, 0.8, 1.2, 0.2, 0.9), None),
        ((0.1, 0.0, 0.1, 0.0), None),  # a step alone is not a fall
        ((1.0, None, 1.0, None, 0.2, None, 0.2), 7),  # steps where nothing was scored
        # A best of -1 may fall to -1.5.
        ((-1.0, -1.0, -2.0, -0.8), None),
        ((-1.0, -1.0, -2.0, -1.2), 4),
    ],
)
def test_a_fall_of_the_mean_reward(rewards, falls_at):
    guards = _guards(reward="skip", reward_drop=0.5)
    left_out = [_rollout(guards, step, reward) for step, reward in enumerate(rewards, 1)]
    found = [step for step, out in enumerate(left_out, 1) if out]
    assert found[:1] == ([] if falls_at is None else [falls_at])


def test_the_history_goes_on_where_it_was_kept():
    """As in a run that was stopped between the steps: it is all that the guards remember."""
    whole = _guards(reward="skip")
    first = _guards(reward="skip")
    rewards = (0.8, 0.8, 1.2, 0.2, 0.7)
    expected = [_rollout(whole, 0, r) for r in rewards]
    found = [_rollout(first, 0, r) for r in rewards[:3]]
    second = _guards(History(**vars(first._history)), reward="skip")
    assert found + [_rollout(second, 0, r) for r in rewards[3:]] == expected == [*[False] * 4, True]


def test_groups_of_equal_rewards_in_a_row():
    guards = _guards(equal_groups="skip")
    equal = (1.0, 0.9, 1.0, 1.0, 1.0, 0.0)
    left_out = [_rollout(guards, step, 0.5, share) for step, share in enumerate(equal)]
    assert left_out == [False, False, False, True, True, False]


def test_equal_groups_are_no_fault_where_they_are_learned_from():
    """Without a baseline from the group, one reward at a time, or with the KL in the reward."""
    for options, is_fault in (
        ({"baseline": "leave_one_out", "whiten": "tokens"}, True),
        ({"kl_coef": 0.1}, True),
        ({"baseline": "none"}, False),
        ({"aggregate": "each"}, False),
        ({"kl_in": "reward", "kl_coef": 0.1}, False),
    ):
        config = _config(equal_groups="skip")
        config.algorithm.update(options)
        guards = Guards(config, History(), "DIR/checkpoints", updates_per_step=1)
        left_out = [_rollout(guards, step, 0.5, 1.0) for step in range(3)]
        assert left_out == [False, is_fault, is_fault], options


def test_rewards_beyond_float32_are_named():
    guards = _guards(nonfinite="roll_back")
    _rollout(guards, 3, math.inf)
    with pytest.raises(RollBack, match=r"Step 3: the mean reward is inf.*reward/f inf"):
        guards.enforce()
    assert not guards._history.rewards  # nothing could be compared with it
    assert _rollout(_guards(nonfinite="skip"), 3, math.inf)  # left out, as it is told


def test_rewards_that_fail_too_often(capsys):
    guards = _guards(failed_rewards="skip")
    guards.check_scores(1, _scores(2))  # a share of 0.5 is not more
    assert not guards.skips_rollout
    guards.check_scores(2, _scores(3))
    assert guards.skips_rollout
    told = capsys.readouterr().out
    assert "Step 2: 3 of 4 completions have no reward 'f', more than rewards.max_" in told
    assert 'It gave nan (guards.failed_rewards = "skip"). Its updates are left out.' in told
    guards.check_scores(3, _scores(0))
    assert not guards.skips_rollout
    with pytest.raises(RewardError, match=r"rewards.max_failed_share = 0.5\. The first: It gave"):
        _guards(failed_rewards="stop").check_scores(2, _scores(3))


def test_rewards_that_never_worked(capsys):
    """It is said first; where no share of failures is too large, it is said at least."""
    with pytest.raises(RewardError, match=r"Step 1: no completion has got the reward 'f' since"):
        _guards().check_scores(1, _scores(4))
    guards = _guards()
    guards.check_scores(1, _scores(2))
    with pytest.raises(RewardError, match=r"Step 2: 4 of 4 completions"):  # it has worked before
        guards.check_scores(2, _scores(4))
    guards = _guards()
    guards._config.rewards.max_failed_share = 1.0
    guards.check_scores(1, _scores(4))
    assert "Step 1: no completion has got the reward 'f' since the start" in capsys.readouterr().out
    assert not guards.skips_rollout


def test_an_evaluation_of_rewards_that_fail_too_often():
    guards = _guards(failed_rewards="stop")
    guards.check_evaluation("At the start", _scores(2))  # a share of 0.5 is not more
    with pytest.raises(RewardError, match=r"After step 2: 3 of 4 completions have no reward 'f'"):
        guards.check_evaluation("After step 2", _scores(3))
    guards = _guards(failed_rewards="skip")
    guards.check_evaluation("After step 2", _scores(4))
    guards.enforce()
    assert not guards.skips_rollout  # nothing is learned from it


# --- What is done ---------------------------------------------------------------------------------


def test_what_is_only_told_is_told_ever_less(capsys):
    guards = _guards(kl_max=0.5)
    for step in range(1, 10):
        guards.check_update(step, _update(kl=0.7), refused=False)
        guards.enforce()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in lines] == [f" Step {n}" for n in (1, 2, 4, 8)]
    assert lines[0].endswith('guards.kl_max = 0.5 (guards.kl = "warn").')


def test_what_the_device_refuses():
    config = _config(kl_max=0.5, kl="skip", entropy_min=0.02, entropy="roll_back")
    assert guard_rules.refusing_bounds(config) == {"policy/kl": (-math.inf, 0.5)}
    config.guards.entropy = "skip"
    assert guard_rules.refusing_bounds(config)["policy/entropy"] == (0.02, math.inf)


def test_refused_updates_in_a_row():
    guards = _guards(max_skipped=3)
    for refused in (True, True, False, True, True):
        guards.check_update(1, _update(loss=math.nan), refused=refused)
        guards.enforce()
    guards.skipped(2, 1)
    with pytest.raises(Diverged, match=r"Step 2: 3 updates in a row were refused: those of guards"):
        guards.enforce()


def test_a_step_of_many_updates_that_is_left_out_counts_as_one():
    """Eight updates each: of five steps the first four are passed, whoever refused them."""
    config = _config(max_skipped=5)
    config.batch.minibatches, config.algorithm.num_iterations = 4, 2
    guards = Guards(
        config,
        History(),
        "DIR/checkpoints",
        updates_per_step=derived.num_updates_per_step(config),
    )
    for step in (1, 2, 3):
        guards.skipped(step, 8)
        guards.enforce()
    for _ in range(15):  # those of step 4, and all but the last of step 5
        guards.check_update(4, _update(loss=math.nan), refused=True)
        guards.enforce()
    guards.check_update(5, _update(loss=math.nan), refused=True)
    with pytest.raises(Diverged, match=r"40 updates in a row.*guards.max_skipped = 5 steps"):
        guards.enforce()


def test_roll_backs_are_counted_and_bounded():
    guards = _guards(History(roll_backs=1), kl_max=0.5, kl="roll_back", max_roll_backs=2)
    guards.check_update(8, _update(kl=0.7), refused=False)
    called = []
    with pytest.raises(RollBack, match=r"policy/kl is 0.7.*Roll-back 2 of guards.max_") as info:
        guards.enforce(before=lambda: called.append(1))
    assert info.value.step == 8 and called == [1]
    guards = _guards(History(roll_backs=2), kl_max=0.5, kl="roll_back", max_roll_backs=2)
    guards.check_update(9, _update(kl=0.7), refused=False)
    with pytest.raises(Diverged, match=r"rolled back guards.max_roll_backs = 2 times already"):
        guards.enforce()


def test_a_stop_goes_before_a_roll_back():
    guards = _guards(kl_max=0.5, kl="roll_back", entropy_min=0.5, entropy="stop")
    guards.check_update(8, _update(kl=0.7, entropy=0.1), refused=False)
    with pytest.raises(Diverged, match=r"policy/entropy"):
        guards.enforce()


@pytest.mark.parametrize("guard", ["nonfinite", "failed_rewards", "after_skips", "kl"])
def test_checkpoints_that_are_due_are_kept_where_a_guard_may_need_them(guard):
    assert not guard_rules.may_roll_back(_config())
    assert guard_rules.may_roll_back(_config(**{guard: "roll_back"}))


# --- Members of an ensemble -----------------------------------------------------------------------


def _with_ensemble(history=None, **options) -> Guards:
    config = _config(**options)
    config.rewards.names = (
        "exact_answer as a",
        "answer_format as b",
        "ensemble:sum(of=['a', 'b']) as all",
    )
    config.rewards.weights = (0.0, 0.0, 1.0)
    return Guards(config, history or History(), "DIR", updates_per_step=1)


def _steps(guards: Guards, a: list[float], b: list[float], first: int = 1) -> None:
    for step, (x, y) in enumerate(zip(a, b), start=first):
        values = {"reward/a": x, "reward/a_std": 0.5, "reward/b": y, "reward/b_std": 0.25}
        guards.check_rollout(step, values)


def test_a_member_that_rises_while_another_falls():
    """Windows of two: a from 0.1 to 0.5, 0.8 of its deviations; b from 0.6 to 0.4, -0.8."""
    guards = _with_ensemble(members="stop")
    _steps(guards, [0.0, 0.2, 0.4], [0.7, 0.5, 0.5])
    guards.enforce()
    _steps(guards, [0.6], [0.3], first=4)
    with pytest.raises(Diverged) as info:
        guards.enforce()
    for part in (
        "Step 4",
        "the reward 'a' rose by 0.8 of its deviations while 'b' fell by 0.8",
        "guards.member_shift = 0.5",
        'guards.members = "stop"',
    ):
        assert part in str(info.value)


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [
        ([0.0, 0.2, 0.4, 0.6], [0.7, 0.5, 0.7, 0.7], {}),  # b does not fall
        ([0.0, 0.2, 0.4, 0.6], [0.7, 0.5, 0.5, 0.5], {}),  # by 0.4 of its deviations alone
        ([0.6, 0.4, 0.2, 0.0], [0.7, 0.5, 0.5, 0.3], {}),  # both fall
        ([0.0, 0.2, 0.4, 0.6], [0.7, 0.5, 0.5, 0.3], {"member_shift": 1.0}),
        ([0.0, 0.2, 0.4, 0.6], [0.7, 0.5, 0.5, 0.3], {"member_shift": 0.0}),
    ],
)
def test_members_that_are_fine(a, b, options):
    guards = _with_ensemble(members="stop", **options)
    _steps(guards, a, b)
    guards.enforce()


def test_what_is_known_of_members_is_part_of_the_state():
    """After a stop in between the guard finds the same."""
    guards = _with_ensemble(members="stop")
    _steps(guards, [0.0, 0.2], [0.7, 0.5])
    kept = json.loads(json.dumps(dataclasses.asdict(guards._history)))
    again = _with_ensemble(History(**kept), members="stop")
    _steps(again, [0.4, 0.6], [0.5, 0.3], first=3)
    with pytest.raises(Diverged, match=r"'a' rose by 0\.8"):
        again.enforce()
    plain = _guards(members="stop")  # without an ensemble there are no members
    _steps(plain, [0.0, 0.2, 0.4, 0.6], [0.7, 0.5, 0.5, 0.3])
    plain.enforce()
    assert not plain._history.members
