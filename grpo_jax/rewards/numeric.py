"""Reward for a number that is close enough to the right one."""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction
from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.rewards.answers import answer_fault, right_or_wrong, stated_answer
from grpo_jax.rewards.exact import normalise, number
from grpo_jax.rewards.spelling import tidy
from grpo_jax.rewards.units import split_unit

_MAX_LENGTH = 200  # characters; a longer answer is no number with a unit
_POWER = re.compile(
    r"(?:(.{1,99}?)\s*(?:\\times|\\cdot|\*|×|x)\s*)?10\s*\^\s*\{?\s*([+-]?[0-9]{1,3})\s*\}?"
)


def numeric_answer(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    relative: float = 1e-3,
    absolute: float = 0.0,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion whose final answer is a number near that of its row, else 0.0.

    Near: apart by at most `relative` times the right number, or by at most `absolute`. A number is
    a decimal, a fraction, or one times a power of ten; a unit is left out, and not compared.
    `answer` is read as by `exact_answer`. Raises ValueError if it holds no number.
    """
    same = functools.partial(_near, relative=relative, absolute=absolute)
    for value in answer:
        if fault := number_fault(value):
            raise ValueError(f"`answer` {fault}: {shown(value)}")
    return right_or_wrong(prompts, completions, answer, rendered_prompts, same)


def number_fault(value: Any) -> str | None:
    """The fault of a value of the column `answer` that holds no number; None for a valid one."""
    fault = answer_fault(value)
    if fault is None and number_of(stated_answer(value)) is None:
        return "is not a number"
    return fault


def number_of(text: str) -> Fraction | None:
    """The number that an answer is, without its unit; None if it is none."""
    if len(text) > _MAX_LENGTH:
        return None
    value = number(normalise(text))
    if value is not None:
        return value
    value = number(normalise(bare := split_unit(tidy(text))[0]))
    if value is not None or (match := _POWER.fullmatch(bare.strip())) is None:
        return value
    factor = number(normalise(match[1])) if match[1] else Fraction(1)
    return None if factor is None else factor * Fraction(10) ** int(match[2])


def _near(expected: str, found: str, *, relative: float, absolute: float) -> bool:
    one, other = number_of(expected), number_of(found)
    if one is None or other is None:
        return False
    return abs(one - other) <= max(Fraction(relative) * abs(one), Fraction(absolute))


def _refuse(relative: float = 0.0, absolute: float = 0.0) -> None:
    for name, value in (("relative", relative), ("absolute", absolute)):
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r} must be a number, 0 or more")


numeric_answer.column_faults = {"answer": number_fault}
numeric_answer.right_or_wrong = True
numeric_answer.options = ("relative", "absolute")
numeric_answer.refuse = _refuse
