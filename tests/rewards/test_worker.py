"""One call of a reward function, whatever it gives back."""

import dataclasses
import decimal
import enum
import functools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.rewards import registry
from grpo_jax.rewards.worker import Call, answer

STATE = {"global_step": 7, "max_steps": 9, "epoch": 0.5}


def call(completions=("a", "bb"), ids=None, **columns):
    rows = list(completions)
    return Call(0, ["p"] * len(rows), rows, ids, columns, STATE)


def run(function, *args, **columns):
    return answer(function, "r", call(*args, **columns), 8)


def named(name):
    return registry.function(f"odd_rewards:{name}")


@pytest.mark.parametrize(
    "values",
    [
        [True, False],
        [np.bool_(True), np.int64(0)],
        (np.float32(1), np.float16(0)),
        np.array([1, 0]),
        np.array([True, False]),
        [np.array(1.0), np.array(0)],
        jnp.array([1.0, 0.0]),
        jnp.array([1.0, 0.0], jnp.bfloat16),
        [jnp.float32(1), jnp.int32(0)],
    ],
)
def test_kinds_of_number(values):
    assert run(lambda **_: values).values == [1, 0]


class OfNumpy:
    """What NumPy alone can read."""

    def __array__(self, dtype=None, copy=None):
        return np.array([1.0, 0.0], np.float32)


@pytest.mark.parametrize("kind", ["torch", "torch scalars", "pandas", "__array__"])
def test_arrays_of_other_libraries(kind):
    if kind == "__array__":
        values = OfNumpy()
    elif kind == "pandas":
        pandas = pytest.importorskip("pandas")
        values = pandas.Series([1, 0], index=[7, 5])
    else:
        torch = pytest.importorskip("torch")
        values = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
        values = list(values) if kind == "torch scalars" else values
    assert run(lambda **_: values).values == [1, 0]


def test_none_is_nan():
    first, second = run(named("letters"), ("?", "abc")).values
    assert math.isnan(first) and second == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], ["1 value for 2 completions"]),
        ([1.0, 2.0, 3.0], ["3 values for 2 completions"]),
        (1.0, ["returned a float"]),
        (None, ["returned a NoneType"]),
        ("12", ["returned a str"]),
        ({"a": 1, "b": 2}, ["returned a dict"]),
        (np.ones((2, 1)), ["returned a ndarray of shape (2, 1)"]),
        (np.array(1.0), ["returned a ndarray of shape ()"]),
        (jnp.ones((1, 2)), ["of shape (1, 2)"]),
    ],
)
def test_wrong_values_fail(values, words):
    got = run(lambda **_: values)
    assert got.values is None and got.failure == "values"
    for word in ["'r'", *words, "test_worker.py, line "]:
        assert word in got.message


@pytest.mark.parametrize(
    ("values", "row", "words"),
    [
        ([1.0, "1"], 1, ["row 1", "'1' (str)", "not a number", "'bb'"]),
        ([decimal.Decimal(1), 0], 0, ["row 0", "Decimal"]),
        ([float("nan"), 1.0], 0, ["row 0", "nan", "finite"]),
        ([1.0, float("-inf")], 1, ["row 1", "-inf"]),
        ([1e39, 1.0], 0, ["row 0", "1e+39", "float32"]),
        (np.array([1e300, 1.0]), 0, ["row 0", "1e+300", "float32"]),
        ([10**400, 1.0], 0, ["row 0", "float32"]),
        ([np.ones(1), 1.0], 0, ["row 0", "[1.0] (list)", "not a number"]),
    ],
)
def test_a_wrong_value_costs_its_row_alone(values, row, words):
    got = run(lambda **_: values)
    assert list(got.faults) == [row] and math.isnan(got.values[row])
    assert got.values[1 - row] in (0, 1)
    for word in ["'r'", *words, "test_worker.py, line "]:
        assert word in got.faults[row]


def test_nested_lists_give_no_values():
    assert list(run(lambda **_: [[1.0], [2.0]]).faults) == [0, 1]


def test_an_exception_is_named():
    def fail(completions, **columns):
        raise KeyError("gold")

    got = run(fail, ("x" * 1000, "y"), answer=[1, 2])
    assert got.failure == "error" and "'r' raised KeyError: 'gold'" in got.message
    assert "['answer']" in got.message and "xxx..." in got.message and len(got.message) < 600


def helper(columns):
    return columns["no_such"]


def calls_a_helper(completions, **columns):
    return [helper(columns) for _ in completions]


def test_where_it_was_raised_is_told():
    """The frames of the user's file, with their code; and the place in another that raised."""
    message = run(calls_a_helper).message
    for word in ("test_worker.py, line ", "in calls_a_helper: return [helper(columns)",
                 'in helper: return columns["no_such"]'):  # fmt: skip
        assert word in message
    message = run(lambda completions: decimal.Decimal("x" * len(completions))).message
    assert "in <lambda>" in message and "InvalidOperation" in message
    bound = functools.partial(calls_a_helper, wrong=1)
    assert "in calls_a_helper" in run(bound).message
    assert "in helper" in run(bound).message


def test_an_error_is_cut_only_after_keys_are_hidden(monkeypatch):
    """Half of a key would not be known as one."""
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")

    def fail(completions):
        raise ValueError("x" * 290 + "correct-horse-battery staple")

    message = run(fail).message
    assert "xxx***" in message and "correct" not in message.partition("(")[0]


def test_leaving_the_program_is_a_failure_like_others():
    assert run(named("exits"), ("bad",)).failure == "error"


def test_what_a_function_is_given():
    assert run(named("only_named"), answer=["a", "?"]).values == [8, 7]  # 1 or 0, plus the step
    assert run(named("num_tokens"), ("a", "b"), [[1, 2], []]).values == [0.25, 0]
    assert run(named("later")).values == [1, 1]


def test_what_a_function_logs():
    got = run(named("logs"), ("a", "bcd"))
    assert got.metrics == {"letters": (4.0, 1)} and got.extras == {"upper": ["A", "BCD"]}


class OfTheUser(enum.StrEnum):
    A = "a"

    def __str__(self):
        return self


def test_what_is_added_to_samples_can_be_written():
    """As JSON, and through the pipe: Python's own types, of a size that a terminal can show."""

    def log(completions, log_extra):
        log_extra("n", [10**5000, 7])
        log_extra("x", [float("inf"), np.float64(0.5)])
        log_extra("t", ["word " * 10**6, OfTheUser.A])
        log_extra("o", [None, True])
        return [0.0] * len(completions)

    extras = run(log).extras
    assert extras["n"] == ["10^300 or more", 7] and extras["x"] == ["inf", 0.5]
    assert len(extras["t"][0]) == 10_000 and extras["t"][1] == "a" and extras["o"] == [None, True]
    for values in extras.values():
        assert {type(v) for v in values} <= {str, int, float, bool, type(None)}
    assert json.loads(json.dumps(extras, allow_nan=False)) == extras


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
