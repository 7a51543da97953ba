"""Completions that try to hang or crash a reward, in front of every built-in one."""

from __future__ import annotations

import functools
import math

import adversarial
import pytest
from growth import processor_s

from grpo_jax.rewards import extras, registry

# Arguments and columns that a reward needs; "answer" is 72, which some completions state.
ARGUMENTS = {
    "regex": {"pattern": r"answer is (\d+|[a-z]*)"},
    "json_schema": {"schema": {"type": "object", "required": ["a"]}},
    "mentions": {"words": ["clips", "sold"]},
    "rouge": {"kind": "rouge1"},
    "clean_language": {"words": ["darn", "dirty word"]},
}
COLUMNS = {"multiple_choice": {"answer": "B"}, "fact_overlap": {"answer": "Natalia sold 72 clips"}}
# By others in tests of their own, or with a model of their own.
ELSEWHERE = {"math_answer", "exact_answer", "similarity"}
NAMES = [name for name in registry.BUILT_IN if name not in ELSEWHERE]


def campaign(name: str, count: int, seed: int = 0) -> float:
    """The most seconds that one of `count` completions took; each value is a number or None."""
    reward = registry.function(name)
    if lacks := extras.of_function(functools.partial(reward, **ARGUMENTS.get(name, {}))):
        pytest.skip(f"{name} {lacks}")
    given = {"answer": "72"} | COLUMNS.get(name, {})
    most = 0.0
    for case in adversarial.make(count, seed):
        values: list[float | None] = []
        everything = {
            "prompts": ["How many?"],
            "completions": [case.completion],
            "completion_ids": [[1] * min(len(case.completion), 100)],
            "max_completion_tokens": 100,
            **{column: [value] for column, value in given.items()},
        }
        arguments = {n: everything[n] for n in registry.accepted(reward, everything)}
        run = lambda: values.extend(reward(**arguments, **ARGUMENTS.get(name, {})))  # noqa: B023, E731
        most = max(most, processor_s(run))
        (value,) = values
        what = f"{case.kind}: {case.completion[:80]!r}"
        assert value is None or (isinstance(value, float | int) and math.isfinite(value)), what
        assert most < 10, what
    return most


@pytest.mark.parametrize("name", NAMES)
def test_a_few_of_each_kind(name):
    campaign(name, 90)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand(name, capsys):
    """`python -m pytest -n 0 -m slow -k ten_thousand -s` prints the slowest completion."""
    most = max(campaign(name, 500, seed) for seed in range(20))
    with capsys.disabled():
        print(f"\n{name}: 10,000 completions, the slowest took {most:.3f} s")
