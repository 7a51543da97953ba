"""Reward for the right final answer, where right means equal as numbers or as tidied text.

Nothing is evaluated: an answer is a decimal, a fraction or a string. So no completion can run code
or make the comparison slow.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.answers import answer_fault, right_or_wrong, strip
from grpo_jax.rewards.characters import as_latex

_PLAIN = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_DECIMAL = re.compile(rf"[+-]?{_PLAIN}(?:[eE][+-]?[0-9]{{1,3}})?")
_RATIO = re.compile(rf"([+-]?{_PLAIN})/({_PLAIN})")
_FRAC = re.compile(rf"([+-]?)\\frac\{{([+-]?{_PLAIN})\}}\{{({_PLAIN})\}}")
_GROUPED = re.compile(r"\$?[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")  # "81, 256" is a list
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_BARE_FRAC = re.compile(r"\\frac\s*([0-9]|\{[^{}]{0,100}\})\s*([0-9]|\{[^{}]{0,100}\})")
# Only the space of a thousands group may be removed between digits: "1 1/2" is not 11/2.
_DIGIT_SPACE = re.compile(r"(?<=[0-9])\s+(?=[0-9])(?![0-9]{3}(?![0-9]))")
_SURE_COMMA = re.compile(r"(?<=[0-9])\s?,\s?\\!\s?(?=[0-9]{3})")
_SIZE = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
_WORD = re.compile(r"(?<![^\W\d_])(?<!\\)[^\W\d_]{3,}")  # not \Pi, which is not \pi; nor R in 2R
# Spellings in LaTeX that do not change the value.
_SYNONYMS = (
    ("\\!", ""),
    ("\\,", " "),
    ("{,}", ","),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\$", ""),
    ("\\%", "%"),
)
# A longer text is not read as a number: the cost of an exact comparison stays bounded.
_MAX_DIGITS = 100


def exact_answer(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion whose extracted answer equals that of its row, else 0.0.

    `answer` holds a number, a short text, or a worked solution that ends in "#### 72" or
    `\\boxed{72}`. `rendered_prompts` are the prompts as the model read them, which may leave
    thinking open. Raises ValueError, saying what is wrong, if `answer` holds no answer.
    """
    return right_or_wrong(prompts, completions, answer, rendered_prompts, same_answer)


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal: as numbers if both are numbers, else as tidied text.

    "1,234.0" equals "1234" and "0.5" equals "1/2" and `\\frac{1}{2}`. A percent sign is dropped:
    "50%" equals "50", not "0.5". Text is compared without spaces and LaTeX spelling, words without
    case: Yes is yes, while 2R is not 2r.
    """
    if one == other:
        return True
    one, other = normalise(one), normalise(other)
    value, other_value = number(one), number(other)
    if value is not None and other_value is not None:
        return value == other_value
    return one == other


exact_answer.column_faults = {"answer": answer_fault}
exact_answer.right_or_wrong = True
exact_answer.same_answer = same_answer


def normalise(text: str) -> str:
    """An answer without spaces, case, percent sign, thousands separators and LaTeX spelling."""
    text = as_latex(text)
    if "\\" in text or "{" in text:
        text = _SURE_COMMA.sub(",", text)
        for spelling, plain in _SYNONYMS:
            text = text.replace(spelling, plain)
        text = _BARE_ROOT.sub(r"\\sqrt{\1}", _SIZE.sub("", text))
        text = _BARE_FRAC.sub(lambda m: "\\frac" + _braced(m[1]) + _braced(m[2]), text)
    text = strip(text).removesuffix("%").rstrip()
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    text = "".join(_DIGIT_SPACE.sub("_", text).split())
    return text.casefold() if text.isalpha() else _WORD.sub(lambda m: m[0].casefold(), text)


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else f"{{{argument}}}"


def number(text: str) -> Fraction | None:
    """The value of a normalised decimal, ratio or \\frac, else None. Its cost is bounded."""
    if len(text) > _MAX_DIGITS:
        return None
    text = text.lstrip("$")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _RATIO.fullmatch(text):
        sign, (top, bottom) = 1, match.groups()
    elif match := _FRAC.fullmatch(text):
        sign, top, bottom = -1 if match[1] == "-" else 1, match[2], match[3]
    else:
        return None
    return sign * Fraction(top) / Fraction(bottom) if Fraction(bottom) else None
