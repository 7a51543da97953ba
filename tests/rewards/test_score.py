import decimal
import pickle
import re
import sys

import numpy as np
import pytest

from grpo_jax.rewards import score as score_lib
from grpo_jax.rewards.score import Reward, RewardError, load, score


def half(prompts, completions, **columns):
    return [0.5 for _ in completions]


def letters(completions, **kwargs):  # TRL's users leave out what they do not read
    return [None if c == "?" else len(c) for c in completions]


not_callable = 3


def run(function, completions=("a", "bb")):
    return score([Reward("r", function, 1.0)], ["p"] * len(completions), list(completions), {})


def test_load_built_in_and_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    rewards = load(("exact_answer", "my_rewards:half"), (1.0, 2))
    assert [r.name for r in rewards] == ["exact_answer", "half"]
    assert [r.weight for r in rewards] == [1.0, 2.0]
    assert rewards[1].function is half
    assert pickle.loads(pickle.dumps(rewards)) == rewards  # they will run in other processes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_anser", ["exact_anser", "Did you mean exact_answer", "answer_format"]),
        ("no_such_module:f", ["no_such_module:f", "ModuleNotFoundError", "exact_answer"]),
        ("my_rewards:hal", ["my_rewards:hal", "no 'hal'", "Did you mean half"]),
        ("my_rewards:not_callable", ["my_rewards:not_callable", "int"]),
        ("my_rewards:", ["my_rewards:", "lacks"]),
        (":half", ["lacks"]),
    ],
)
def test_load_refuses_names(monkeypatch, name, words):
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    with pytest.raises(ValueError) as error:
        load((name,), (1.0,))
    for word in ["rewards.names", *words]:
        assert word in str(error.value)


def test_load_refuses_a_module_that_fails(monkeypatch, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"rewards\.names.*ZeroDivisionError"):
        load(("broken_rewards:f",), (1.0,))


def test_load_refuses_weights_and_doubles(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    with pytest.raises(ValueError, match=r"rewards\.weights.*nan"):
        load(("exact_answer",), (float("nan"),))
    with pytest.raises(ValueError, match=r"rewards\.weights 1"):
        load(("exact_answer", "my_rewards:half"), (1.0,))
    with pytest.raises(ValueError, match="two rewards called 'half'"):
        load(("my_rewards:half", "my_rewards:half"), (1.0, 1.0))


def test_weighted_sum_and_missing():
    rewards = [Reward("letters", letters, 2.0), Reward("half", half, -1.0)]
    scores = score(rewards, ["p"] * 3, ["abc", "?", ""], {"answer": [1, 2, 3]})
    # 2 * 3 - 0.5, None counts as 0: -0.5, 2 * 0 - 0.5
    np.testing.assert_array_equal(scores.reward_B, np.array([5.5, -0.5, -0.5], np.float32))
    np.testing.assert_array_equal(scores.by_name["letters"], [3, np.nan, 0])
    np.testing.assert_array_equal(scores.by_name["half"], [0.5, 0.5, 0.5])
    assert scores.num_missing == 0
    assert {a.dtype for a in [scores.reward_B, *scores.by_name.values()]} == {np.dtype("float32")}


def test_rows_without_any_reward_are_counted():
    scores = run(letters, ("?", "a", "?"))
    np.testing.assert_array_equal(scores.reward_B, [0, 1, 0])
    assert scores.num_missing == 2


def test_columns_reach_the_reward_and_are_its_own():
    def spoil(prompts, completions, answer, **columns):
        answer.clear(), completions.clear(), prompts.clear()
        return [float(v) for v in columns["level"]]

    columns = {"answer": ["x", "y"], "level": [1, 2]}
    rewards = [Reward("spoil", spoil, 1.0), Reward("letters", letters, 1.0)]
    scores = score(rewards, ["p", "q"], ["a", "bb"], columns)
    np.testing.assert_array_equal(scores.reward_B, [2, 4])
    assert columns == {"answer": ["x", "y"], "level": [1, 2]}


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
    np.testing.assert_array_equal(run(lambda **_: values).reward_B, [1, 0])


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
def test_wrong_values_are_refused(values, words):
    with pytest.raises(RewardError) as error:
        run(lambda **_: values)
    for word in ["'r'", *words]:
        assert word in str(error.value)


def test_an_exception_is_named():
    def fail(completions, **columns):
        raise KeyError("gold")

    with pytest.raises(RewardError, match=re.escape("'r' raised KeyError: 'gold'")) as error:
        run(fail, ("x" * 1000, "y"))
    assert "xxx..." in str(error.value) and len(str(error.value)) < 500
    assert isinstance(error.value.__cause__, KeyError)


def test_a_missing_column_is_named():
    rewards = load(("exact_answer",), (1.0,))
    with pytest.raises(RewardError, match=r"exact_answer.*'answer'.*columns \['gold'\]"):
        score(rewards, ["p"], ["c"], {"gold": [1]})


def test_every_built_in_scores():
    rewards = load(tuple(score_lib.BUILT_IN), (1.0,) * len(score_lib.BUILT_IN))
    scores = score(rewards, ["p"], ["#### 3"], {"answer": ["3"]})
    np.testing.assert_array_equal(scores.reward_B, [2.0])
