"""Reward for the right final answer, where right means equal as numbers or as tidied text.

Nothing is evaluated: an answer is a decimal, a fraction or a string, so that no completion, however
strange, can run code or keep the comparison busy.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

_PLAIN = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_DECIMAL = re.compile(rf"[+-]?{_PLAIN}(?:[eE][+-]?[0-9]{{1,3}})?")
_RATIO = re.compile(rf"([+-]?{_PLAIN})/({_PLAIN})")
_FRAC = re.compile(rf"([+-]?)\\frac\{{([+-]?{_PLAIN})\}}\{{({_PLAIN})\}}")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_ANSWER_IS = re.compile(r"answer is", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.\s")
_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_BARE_ARGUMENT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
# Spellings in LaTeX that do not change the value.
_SYNONYMS = (
    ("\\left", ""),
    ("\\right", ""),
    ("\\!", ""),
    ("\\,", ""),
    ("{,}", ","),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\$", ""),
    ("\\%", "%"),
    ("−", "-"),
)
# A longer text is not read as a number: the cost of an exact comparison stays bounded.
_MAX_DIGITS = 100


def exact_answer(
    prompts: list[str], completions: list[str], answer: list[Any], **columns: Any
) -> list[float]:
    """1.0 for each completion whose extracted answer equals that of its row, else 0.0.

    `answer` holds a number, a short text, or a worked solution that ends in "#### 72" or
    `\\boxed{72}`. Raises ValueError, naming the row, where it holds no answer.
    """
    return [
        float(_is_right(c, _expected(a, i))) for i, (c, a) in enumerate(zip(completions, answer))
    ]


def extract_answer(text: str) -> str | None:
    """The final answer that a solution states, or None.

    The first of these that is there and not blank, each in its last occurrence: what follows
    "####" on its line; the inside of `\\boxed{}`; the inside of <answer></answer>; what follows
    "answer is" in its sentence. Without surrounding spaces, "$", "*", ":" and the trailing period.
    """
    for find in (_after_marker, _in_box, _in_tags, _after_answer_is):
        found = find(text)
        if found is not None and (tidy := _strip(found)):
            return tidy
    return None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal: as numbers where both are, else as tidied text.

    "1,234.0" equals "1234" and "0.5" equals "1/2" and `\\frac{1}{2}`. A percent sign is dropped:
    "50%" equals "50", not "0.5". Text is compared without case, spaces and LaTeX spelling.
    """
    one, other = _normalise(one), _normalise(other)
    number, other_number = _number(one), _number(other)
    if number is not None and other_number is not None:
        return number == other_number
    return one == other


def _is_right(completion: str, expected: str) -> bool:
    found = extract_answer(completion)
    return found is not None and same_answer(found, expected)


def _expected(answer: Any, row: int) -> str:
    text = "" if answer is None else str(answer)
    if "####" in text or "\\boxed" in text:
        text = extract_answer(text) or ""
    if not _strip(text):
        raise ValueError(f"the column `answer` holds no answer in row {row}: {answer!r}")
    return text


# --- Where answers stand --------------------------------------------------------------------------


def _after_marker(text: str) -> str | None:
    _, marker, rest = text.rpartition("####")
    return rest.partition("\n")[0] if marker else None


def _in_box(text: str) -> str | None:
    """Inside of the \\boxed{ that opens last and is closed, in one pass over the braces."""
    open_braces: list[tuple[bool, int]] = []
    found, found_start = None, -1
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace in ("\\{", "\\}"):
            continue
        if brace != "}":
            open_braces.append((brace != "{", match.end()))
        elif open_braces:
            is_box, start = open_braces.pop()
            if is_box and start > found_start:
                found, found_start = text[start : match.start()], start
    return found


def _in_tags(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def _after_answer_is(text: str) -> str | None:
    last = None
    for last in _ANSWER_IS.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    line = text[last.end() :].lstrip(" :\t\n").partition("\n")[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0]


# --- When answers are equal -----------------------------------------------------------------------


def _strip(text: str) -> str:
    return text.strip(" \t\r\n$*:").rstrip(".").strip(" \t\r\n$*")


def _normalise(text: str) -> str:
    for spelling, plain in _SYNONYMS:
        text = text.replace(spelling, plain)
    text = _BARE_ARGUMENT.sub(r"\\sqrt{\1}", text)
    return "".join(_strip(text).casefold().split()).removesuffix("%")


def _number(text: str) -> Fraction | None:
    """The value of a decimal, a ratio or a \\frac, else None. Never slow, whatever the text."""
    if len(text) > _MAX_DIGITS:
        return None
    text = text.lstrip("$")
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _RATIO.fullmatch(text):
        sign, (top, bottom) = 1, match.groups()
    elif match := _FRAC.fullmatch(text):
        sign, top, bottom = -1 if match[1] == "-" else 1, match[2], match[3]
    else:
        return None
    return sign * Fraction(top) / Fraction(bottom) if Fraction(bottom) else None
