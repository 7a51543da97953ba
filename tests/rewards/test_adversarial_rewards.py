"""Completions that try to hang or crash a reward, in front of every built-in one.

`python tests/fuzz/completions.py` gives each 10,000 of them.
"""

from __future__ import annotations

import adversarial
import attacked
import pytest


@pytest.fixture(scope="module")
def cases() -> list[adversarial.Case]:
    return adversarial.of_each_kind()


def test_there_are_cases_of_every_kind(cases):
    assert {case.kind for case in cases} == {case.kind for case in adversarial.make(4000)}
    assert len({case.completion for case in cases}) == len(cases) > 400


@pytest.mark.parametrize("name", attacked.NAMES)
def test_none_hangs_or_crashes_a_reward(name, cases):
    if lacks := attacked.lacks(name):
        pytest.skip(f"{name} {lacks}")
    attacked.slowest_s(name, cases)
