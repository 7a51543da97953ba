"""Every built-in reward in front of completions that try to hang or crash it.

`tests/fuzz/completions.py` gives each 10,000 of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

from adversarial import Case
from growth import processor_s

from grpo_jax.rewards import extras, registry

LIMIT_S = 10  # of processor time, for one completion
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
ELSEWHERE = {"math_answer", "exact_answer", "similarity", "classifier", "code"}
NAMES = [name for name in registry.BUILT_IN if name not in ELSEWHERE]


def lacks(name: str) -> str:
    """What must be installed for a reward; "" where nothing is missing."""
    return extras.of_function(functools.partial(registry.function(name), **ARGUMENTS.get(name, {})))


def slowest_s(name: str, cases: Iterable[Case]) -> float:
    """The most seconds of processor time that a completion took. Each value is a number or None."""
    reward, given = registry.function(name), {"answer": "72"} | COLUMNS.get(name, {})
    most = 0.0
    for case in cases:
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
        assert most < LIMIT_S, what
    return most
