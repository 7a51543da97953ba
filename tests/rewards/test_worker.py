"""One call of a reward function, whatever it gives back."""

import dataclasses
import decimal
import math

import numpy as np
import pytest

from grpo_jax.rewards import reward as reward_lib
from grpo_jax.rewards.worker import Call, answer

STATE = {"global_step": 7, "max_steps": 9, "epoch": 0.5}


def call(completions=("a", "bb"), ids=None, **columns):
    rows = list(completions)
    return Call(0, ["p"] * len(rows), rows, ids, columns, STATE)


def run(function, *args, **columns):
    return answer(function, "r", call(*args, **columns), 8)


def named(name):
    return reward_lib.function(f"odd_rewards:{name}")


@pytest.mark.parametrize(
    "values",
    [
        [True, False],
        [np.bool_(True), np.int64(0)],
        (np.float32(1), np.float16(0)),
        np.array([1, 0]),
    ],
)
def test_kinds_of_number(values):
    assert run(lambda **_: values).values == [1, 0]


def test_none_is_nan():
    first, second = run(named("letters"), ("?", "abc")).values
    assert math.isnan(first) and second == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], ["1 values for 2 completions"]),
        ([1.0, 2.0, 3.0], ["3 values for 2 completions"]),
        (1.0, ["returned a float"]),
        (None, ["returned a NoneType"]),
        (np.ones((2, 1)), ["returned a ndarray"]),
        ([1.0, "1"], ["row 1", "'1' (str)", "not a number", "'bb'"]),
        ([decimal.Decimal(1), 0], ["row 0", "Decimal"]),
        ([[1.0], [2.0]], ["row 0", "list"]),
        ([1.0, float("nan")], ["row 1", "nan", "finite"]),
        ([float("-inf"), 1.0], ["row 0", "-inf"]),
        ([1e39, 1.0], ["row 0", "1e+39", "float32"]),
        ([10**400, 1.0], ["row 0", "float32"]),
    ],
)
def test_wrong_values_fail(values, words):
    got = run(lambda **_: values)
    assert got.values is None and got.failure == "values"
    for word in ["'r'", *words]:
        assert word in got.message


def test_an_exception_is_named():
    def fail(completions, **columns):
        raise KeyError("gold")

    got = run(fail, ("x" * 1000, "y"), answer=[1, 2])
    assert got.failure == "error" and "'r' raised KeyError: 'gold'" in got.message
    assert "['answer']" in got.message and "xxx..." in got.message and len(got.message) < 500


def test_leaving_the_program_is_a_failure_like_others():
    assert run(named("exits"), ("bad",)).failure == "error"


def test_what_a_function_is_given():
    assert run(named("only_named"), answer=["a", "?"]).values == [8, 7]  # 1 or 0, plus the step
    assert run(named("num_tokens"), ("a", "b"), [[1, 2], []]).values == [0.25, 0]
    assert run(named("later")).values == [1, 1]


def test_what_a_function_logs():
    got = run(named("logs"), ("a", "bcd"))
    assert got.metrics == {"letters": (4.0, 1)} and got.extras == {"upper": ["A", "BCD"]}


def test_a_metric_of_a_name_that_is_none_is_refused():
    """It would end the run where its metrics are written."""

    def log(completions, log_metric, answer):
        log_metric(answer[0], 1.0)
        return [0.0] * len(completions)

    assert run(log, answer=["level:3-b"]).metrics == {"level:3-b": (1.0, 1)}
    for name in ("", "two words", "../up", "a\nb", "x" * 101):
        got = run(log, answer=[name])
        assert got.failure == "error" and "log_metric takes names of letters" in got.message


def test_one_row_of_a_call():
    whole = call(("a", "bb"), [[1], [2, 3]], answer=[4, 5])
    assert whole.row(1) == Call(0, ["p"], ["bb"], [[2, 3]], {"answer": [5]}, STATE)
    assert call().row(0).completion_ids is None and call().row(0).rendered_prompts is None
    rendered = dataclasses.replace(whole, rendered_prompts=["<s>p", "<s>q"])
    assert rendered.row(1).rendered_prompts == ["<s>q"]
