"""What a draw asks, and what its rewards tell about the problems."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.config import options as options_lib
from grpo_jax.data.pass_rates import PassRates, Preference
from grpo_jax.data.prompts import prompt_indices
from grpo_jax.environments.single_turn import Draws, Rollout
from grpo_jax.rewards.scores import Scores
from grpo_jax.trainers import prompt_choice
from grpo_jax.trainers.run_state import RunState

NAN = float("nan")


def _run(problems: int, accuracy: str | None = None, **chosen):
    config = options_lib.default()
    config.batch.prompts, config.seed = 4, 7
    config.prompts.update({name: value for name, value in chosen.items() if name != "repeat"})
    config.data.repeat = chosen.get("repeat", 1)
    return SimpleNamespace(
        config=config,
        train=SimpleNamespace(problems=[None] * problems),
        rewards=SimpleNamespace(accuracy=accuracy),
    )


def test_by_default_epochs_follow_each_other():
    run = _run(6)
    for number in range(4):
        want = prompt_indices(7, number, 6, 4)
        found = prompt_choice.problems(run, RunState(), number)
        np.testing.assert_array_equal(found, want)


def test_an_epoch_asks_each_problem_as_often_as_it_is_repeated():
    run = _run(2, repeat=6)
    epoch = [prompt_choice.problems(run, RunState(), number) for number in range(3)]
    assert np.bincount(np.concatenate(epoch)).tolist() == [6, 6]
    assert prompt_choice.problems(_run(1, repeat=4), RunState(), 0).tolist() == [0] * 4


def test_where_rates_count_they_decide_what_is_asked():
    run = _run(6, outside_weight=0.25, low_rate=0.1, high_rate=0.6, replay_share=0.5)
    rates = PassRates.unseen(6).after([0, 1, 2], [1.0, 0.5, 0.05], newest=0.5)
    want = Preference(0.1, 0.6, 0.25, 0.5).draw(rates, 7, 3, 4)
    state = RunState(pass_rates=rates)
    np.testing.assert_array_equal(prompt_choice.problems(run, state, 3), want)
    new = Preference(0.1, 0.6, 0.25, 0.5).draw(PassRates.unseen(6), 7, 3, 4)
    np.testing.assert_array_equal(prompt_choice.problems(run, RunState(), 3), new)


def _scores(right_PG) -> Scores:
    """Twice the accuracy as the reward; NaN where it does not apply."""
    value_B = np.float32(right_PG).ravel()
    none_B = np.zeros(len(value_B), bool)
    return Scores(2 * value_B, {"right": value_B}, {"right": none_B}, {"right": value_B})


@pytest.mark.parametrize(("accuracy", "unit"), [("right", 1), (None, 2)])
def test_a_group_measures_its_problem(accuracy, unit):
    """Its accuracy among the completions that are judged, or else its mean reward."""
    run = _run(5, accuracy, replay_share=0.1, newest_share=0.5, low_rate=0.3, high_rate=0.8)
    state = RunState(pass_rates=PassRates.unseen(5).after([3], [1.0], newest=1.0))
    sampled = Rollout(None, None, None, 1.0, problem_P=[3, 0, 1])
    scores = _scores([[1, 0, 0, 0], [1, NAN, 0, NAN], [NAN] * 4])
    values = prompt_choice.measure(run, state, sampled, scores)
    assert state.pass_rates.times_N.tolist() == [1, 0, 0, 2, 0]
    assert state.pass_rates.rate_N[[0, 3]].tolist() == [0.5 * unit, 0.5 + 0.125 * unit]
    assert values["prompts/unseen_share"] == 3 / 5
    assert values["prompts/replayed_share"] == 1 / 3  # problem 3 was solved before
    assert values["prompts/easy_share"] == (0 if unit == 1 else 1 / 5)  # problem 0 has 1.0
    assert values["prompts/hard_share"] == 0


def test_an_unknown_completion_measures_nothing():
    """But a failure that counts as the least is a wrong answer."""
    for reward, rate in ((NAN, 1.0), (0.0, 0.5)):
        scores = _scores([[1, NAN]])
        scores.failed["right"][1], scores.reward_B[1] = True, reward
        state = RunState()
        sampled = Rollout(None, None, None, 1.0, problem_P=[1])
        prompt_choice.measure(_run(3, "right", outside_weight=0.5), state, sampled, scores)
        assert state.pass_rates.rate_N[1] == rate


def test_groups_that_are_not_learned_from_measure_too():
    run = _run(3, "right", outside_weight=0.5)
    state, length_NG = RunState(), np.ones((3, 2), np.int32)
    scores = _scores([[1, 1], [0, 0], [1, 0]])
    draws = Draws(1, np.arange(3), length_NG[:, 0], length_NG, length_NG > 0, scores, num_equal=2)
    sampled = Rollout(None, None, None, 1.0, problem_P=[2], draws=draws)
    values = prompt_choice.measure(run, state, sampled, _scores([[1, 0]]))
    assert state.pass_rates.rate_N.tolist() == [1.0, 0.0, 0.5]
    assert (values["prompts/easy_share"], values["prompts/hard_share"]) == (1 / 3, 1 / 3)


def test_nothing_is_measured_that_does_not_count():
    state = RunState()
    sampled = Rollout(None, None, None, 1.0, problem_P=[0])
    assert prompt_choice.measure(_run(3, "right"), state, sampled, _scores([[1, 0]])) == {}
    assert state.pass_rates is None
