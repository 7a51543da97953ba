"""Reward functions by name, with arguments, and against the data's columns."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from odd_rewards import at_least, half

from grpo_jax.config import arguments
from grpo_jax.config.loading import spec_of
from grpo_jax.data.problems import Problem
from grpo_jax.rewards import kinds, registry
from grpo_jax.rewards.registry import Reward, load


def test_built_in_and_own():
    rewards = load(("exact_answer", "odd_rewards:half"), (1.0, 2))
    assert rewards == [
        Reward("exact_answer", "exact_answer", 1.0, gives_accuracy=True),
        Reward("half", "odd_rewards:half", 2.0),
    ]
    assert registry.function("odd_rewards:half") is half


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_built_in_is_there(name):
    assert registry.function(name).__name__ == name


def test_the_docs_name_every_built_in():
    page = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()
    assert all(f"| `{name}" in page for name in registry.BUILT_IN)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_anser", ["exact_anser", "Did you mean exact_answer", "answer_format"]),
        ("no_such_module:f", ["no_such_module:f", "ModuleNotFoundError", "exact_answer"]),
        ("odd_rewards:hal", ["odd_rewards:hal", "no 'hal'", "Did you mean half"]),
        ("odd_rewards:not_callable", ["odd_rewards:not_callable", "int"]),
        ("odd_rewards:", ["odd_rewards:", "lacks"]),
        (":half", ["lacks"]),
        ("odd_rewards:times(factor=", ["cannot be read", "name=value"]),
        ("odd_rewards:times(factor=" + "-" * 10**5 + "1)", ["cannot be read"]),
        ("odd_rewards:times(2)", ["arguments must be written name=value"]),
        ("odd_rewards:times(factor=open('x'))", ["cannot be read"]),
        ("odd_rewards:times(factr=2)(1)", ["cannot be read"]),
        ("odd_rewards:at_least(lo=3)", ["does not take", "unexpected keyword argument 'lo'"]),
        ("odd_rewards:num_tokens(width=3).x", ["cannot be read"]),
    ],
)
def test_names_are_refused(name, words):
    with pytest.raises(ValueError) as error:
        load((name,), (1.0,))
    for word in ["rewards.names", *words]:
        assert word in str(error.value)


def test_a_module_that_fails_is_refused(monkeypatch, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"rewards\.names.*ZeroDivisionError"):
        load(("broken_rewards:f",), (1.0,))


@pytest.mark.parametrize("text", ["import sys\nsys.exit()", "raise SystemExit('usage: ...')"])
def test_a_module_that_exits_is_refused(monkeypatch, tmp_path, text):
    """As a script does that parses its arguments: the program would end with status 0."""
    (tmp_path / "exiting_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'exiting_rewards:f' cannot.*SystemExit.*__main__"):
        load(("exiting_rewards:f",), (1.0,))


def test_a_factory_that_exits_is_refused():
    with pytest.raises(ValueError, match=r"'sys:exit\(status=0\)' does not take"):
        load(("sys:exit(status=0)",), (1.0,))


def test_a_module_that_does_not_end_its_import_ends_the_program(tmp_path):
    """With a message that says where it waits; first a word that it takes long."""
    (tmp_path / "endless_rewards.py").write_text("import time\ntime.sleep(1000)\n")
    code = (
        "from grpo_jax.rewards import registry, slow_import; slow_import._TOLD_AFTER_S = 0.1; "
        "registry.load(('endless_rewards:f',), (1.0,), start_limit_s=0.5)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1 and not done.stdout
    told, error = done.stderr.splitlines()
    where = "endless_rewards.py, line 2, in <module>: time.sleep(1000)"
    assert told.startswith("rewards.names: 'endless_rewards:f' is still") and where in told
    assert error.startswith("error: rewards.names: 'endless_rewards:f' was not imported")
    assert "rewards.start_timeout_s = 0.5 s" in error and where in error


def test_a_function_in_place_of_its_name():
    assert spec_of(half) == "odd_rewards:half"
    assert registry.function(spec_of(registry.function("exact_answer"))) is (
        registry.function("exact_answer")
    )
    for found in (lambda completions: [], functools.partial(half, level=1), at_least(low=1)):
        with pytest.raises(ValueError, match=r'rewards.names holds the.*"my_rewards:\w+|<lambda>"'):
            spec_of(found)


def test_weights_and_doubles_are_refused():
    with pytest.raises(ValueError, match=r"rewards\.weights.*nan"):
        load(("exact_answer",), (float("nan"),))
    with pytest.raises(ValueError, match=r"rewards\.weights 1"):
        load(("exact_answer", "odd_rewards:half"), (1.0,))
    with pytest.raises(ValueError, match="two rewards called 'half'"):
        load(("odd_rewards:half", "odd_rewards:half"), (1.0, 1.0))


def test_arguments_are_bound_or_given_to_a_factory():
    bound = registry.function("odd_rewards:times(factor=-2)")
    assert isinstance(bound, functools.partial) and bound(completions=["abc"]) == [-6]
    made = registry.function("odd_rewards:at_least(low=2, high=3)")
    assert made(completions=["a", "bb", "bbb", "bbbb"]) == [0, 1, 1, 0]
    (reward,) = load(("odd_rewards:at_least(low=2)",), (1.0,))
    assert reward.name == "at_least"


def test_a_function_is_given_what_it_takes():
    given = {"completions", "answer", "trainer_state", "log_metric", "level"}
    accepted = lambda name: registry.accepted(registry.function(f"odd_rewards:{name}"), given)  # noqa: E731
    assert accepted("half") == given
    assert accepted("only_named") == {"completions", "answer", "trainer_state"}

    @dataclasses.dataclass  # without a hash
    class Level:
        level: float

        def __call__(self, completions, level):
            return [self.level] * len(completions)

    for _ in range(2):
        assert registry.accepted(Level(1.0), given) == {"completions", "level"}


def test_arguments_are_read_where_they_are_named():
    rewards = load(("odd_rewards:num_tokens",), (1.0,))
    assert registry.reads(rewards, "completion_ids")
    assert not registry.reads(rewards, "rendered_prompts")  # nor by **columns
    assert not registry.reads(load(("exact_answer",), (1.0,)), "completion_ids")


def test_a_missing_column_is_named_with_its_file():
    problems = [Problem("2+2?", {"gold": "4"}, "sums.jsonl, line 1")]
    rewards = load(("exact_answer",), (1.0,))
    with pytest.raises(ValueError) as error:
        registry.refuse_columns(rewards, problems)
    for word in (
        "'exact_answer'",
        "`answer`",
        "sums.jsonl, line 1",
        "prompt, gold",
        "data.columns",
    ):
        assert word in str(error.value)


def test_a_wrong_value_is_named_with_file_row_and_column(monkeypatch):
    monkeypatch.setattr(half, "column_faults", {"answer": lambda v: None if v else "is blank"},
                        raising=False)  # fmt: skip
    good, bad = (
        Problem("a", {"answer": "4"}, "f, line 1"),
        Problem("b", {"answer": ""}, "f, line 2"),
    )
    rewards = load(("odd_rewards:half",), (1.0,))
    assert registry.faulty_rows(rewards, [good]) == {}
    (row,) = registry.faulty_rows(rewards, [good, bad]).items()
    assert row[0] == 1 and row[1].startswith("f, line 2: column `answer` is blank: ''")
    assert "'half'" in row[1]


def test_what_the_config_binds_is_no_column():
    """A column of that name is neither checked nor given."""
    good, bad = Problem("a", {"words": ["x"]}, "f, row 1"), Problem("b", {"words": 3}, "f, row 2")
    assert list(registry.faulty_rows(load(("mentions",), (1.0,)), [good, bad])) == [1]
    bound = load(("mentions(words=['a'])",), (1.0,))
    assert registry.faulty_rows(bound, [good, bad]) == {}
    given = {"completions", "words", "tags", "ngram"}
    accepted = lambda name: registry.accepted(registry.function(name), given)  # noqa: E731
    assert accepted("mentions(words=['a'])") == {"completions", "tags", "ngram"}
    assert accepted("mentions") == given
    # What only the config can give, as a data set may have columns of such names.
    assert accepted("strict_tags") == {"completions", "words", "ngram"}
    assert accepted("repetition_penalty") == {"completions", "words", "tags"}


def test_a_label_is_the_name_in_metrics():
    names = (
        "exact_answer as right",
        "odd_rewards:times(factor=2) as twice",
        "odd_rewards:times(factor=3)",
    )
    rewards = load(names, (1.0, 2.0, 3.0), accuracy="right")
    assert [r.name for r in rewards] == ["right", "twice", "times"]
    assert rewards[0].gives_accuracy and rewards[0].spec == "exact_answer"
    assert registry.function(names[1])(completions=["abc"]) == [6]
    with pytest.raises(ValueError, match=r"two rewards called 'right'.*as OTHER"):
        load(("exact_answer as right", "odd_rewards:half as right"), (1.0, 1.0))


@pytest.mark.parametrize(
    ("entry", "name", "runs"),
    [
        ("exact_answer", "exact_answer", "workers"),
        ("odd_rewards:half", "half", "workers"),
        ("python:mine", "mine", "workers"),
        ("python:mine(a=1) as yours", "yours", "workers"),
        ("model:runs/helpful/export", "helpful", "devices"),
        ("model:runs/helpful/export/ as kind", "kind", "devices"),
        ("model:org/name", "name", "devices"),
        ("classifier:runs/bert#toxic", "toxic", "workers"),
        ('classifier:runs/bert(against="prompt")', "bert", "workers"),
    ],
)
def test_what_a_prefix_says(entry, name, runs):
    assert registry.short_name(entry) == name and kinds.runs(entry) == runs


def test_prefixes_are_no_modules():
    assert {prefix.removesuffix(":") for prefix in kinds.KINDS} == arguments.NO_MODULES
    (reward,) = load(("model:runs/a/export as b",), (1.0,))
    assert (reward.model, reward.runs) == ("runs/a/export", "devices")


def test_rewards_whose_steps_count():
    names = ("right_steps as chain", "exact_answer")
    first, second = load(names, (1.0, 1.0), by_step=("right_steps as chain",))
    assert first.by_step and not second.by_step
    assert load(names, (1.0, 1.0), by_step=("chain",))[0].by_step
    with pytest.raises(
        ValueError, match=r"rewards.by_step: 'steps' is none of the .* chain, exact"
    ):
        load(names, (1.0, 1.0), by_step=("steps",))
    with pytest.raises(ValueError, match=r"by_step: 'exact_answer' tells of no steps.*`log_steps`"):
        load(names, (1.0, 1.0), by_step=("exact_answer",))
