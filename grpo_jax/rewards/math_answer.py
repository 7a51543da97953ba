"""Reward for the right final answer, where right means equal as mathematics.

An answer is taken apart before sympy sees any of it. It gets one spelling (`spelling`), is cut into
lists, tuples and names (`shapes`), and loses its units (`units`); values remain. Values that are
equal as numbers or as text never reach sympy; `expressions` compares the rest.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from grpo_jax.rewards import shapes
from grpo_jax.rewards.answers import answer_fault, right_or_wrong
from grpo_jax.rewards.exact import normalise, number, same_answer
from grpo_jax.rewards.expressions import is_shallow, same_expression
from grpo_jax.rewards.spelling import in_radians, tidy, without_degrees
from grpo_jax.rewards.units import split_unit

_MAX_LENGTH = 300  # characters; the longest answer in MATH has 159
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_CHOICE = re.compile(r"(?:\(\s?([A-J])\s?\)|([A-J])\s?(?:\)|[.:]\s))\s*(?=\S)")
_SECOND_CHOICE = re.compile(r"(?<![a-zA-Z\\])[A-J]\s?\)")
_TIME = re.compile(r"([0-9]{1,2})\s?:\s?([0-9]{2})\s?(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)


def math_answer(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion whose extracted answer equals that of its row, else 0.0.

    `answer` holds a number, a short text or LaTeX, or a worked solution that ends in "#### 72" or
    `\\boxed{72}`. `rendered_prompts` are the prompts as the model read them, which may leave
    thinking open. Raises ValueError, saying what is wrong, if `answer` holds no answer. No
    completion raises an error.
    """
    return right_or_wrong(prompts, completions, answer, rendered_prompts, same_mathematics)


def same_mathematics(expected: str, found: str) -> bool:
    """Whether two answers are equal, by `same_answer` or as mathematics.

    A unit, a degree sign, a number's base, or "x =" may be on one side only; if both sides have
    one, they must agree. Brackets must be alike, so (1,2), [1,2] and {1,2} all differ; "1,2" is the
    set {1,2}, and the parts of both come in any order. Decimals are not rounded: 0.333 is not 1/3.
    Words are compared as text.
    """
    if same_answer(expected, found):
        return True
    if max(len(expected), len(found)) > _MAX_LENGTH:
        return False
    are_plain = (number(normalise(t)) is not None and "%" not in t for t in (expected, found))
    if all(are_plain):
        return False  # the usual case, a hundred times as fast as sympy
    one, other = tidy(expected), tidy(found)
    if same_answer(one, other):
        return True
    if not (is_shallow(one) and is_shallow(other)):
        return False
    one, other = (shapes.read(_choice(text), _same_value) for text in (one, other))
    return shapes.equal(one.alone(), other.alone(), _same_value, same_expression)


math_answer.column_faults = {"answer": answer_fault}
math_answer.right_or_wrong = True
math_answer.same_answer = same_mathematics


def _choice(text: str) -> str:
    """The letter of a choice that is followed by its content, as in (B) 42; else the text."""
    bare = _TEXT.sub(r"\1", text).strip()
    match = _CHOICE.match(bare)
    if not match or bare[match.end()] in ",;" or _SECOND_CHOICE.search(bare, match.end()):
        return text
    return match[1] or match[2]


@functools.lru_cache(maxsize=4096)
def _same_value(one: str, other: str) -> bool:
    """Whether two values are equal; a unit may be on one side only."""
    (one, unit), (other, other_unit) = split_unit(one), split_unit(other)
    if unit and other_unit and unit != other_unit:
        return False
    one, other = (_TEXT.sub(r"\1", text).strip() for text in (one, other))
    if same_answer(one, other):
        return True
    if all(number(normalise(text)) is not None and "%" not in text for text in (one, other)):
        return False
    times = [_time(text, of_day) for text, of_day in ((one, unit), (other, other_unit))]
    if None not in times:
        return times[0] == times[1]
    if ("\\circ" in one) != ("\\circ" in other):  # tan 15 for the tangent of 15 degrees
        if same_expression(without_degrees(one), without_degrees(other)):
            return True
    return same_expression(in_radians(one), in_radians(other))


def _time(text: str, unit: str) -> tuple[int, int] | None:
    """Hour and minute of a time of day, from 3:30 and "pm" or from 15:30; None for other texts."""
    match = _TIME.fullmatch(text)
    if not match:
        return None
    hour, minute = int(match[1]), int(match[2])
    return hour % 12 + 12 * (unit == "pm") if unit in ("am", "pm") else hour, minute
