"""Where an answer stands: in a completion, in a worked solution, in a column of the data.

A completion may hold anything, a megabyte of braces included; every search here is one pass.
"""

from __future__ import annotations

import math
import numbers
import re
from typing import Any

from grpo_jax.messages import shown

# \boxed{ and \fbox{ open a box; so does \boxed before a bare token. Escaped braces are text.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{|\\(?:boxed|fbox)(?![a-zA-Z{])|\\[{}]|[{}]")
_BARE = re.compile(r"\s{0,9}([^\s${}]\S{0,99})")
# "answer is", "answer: ", "**Final Answer**:", "answer to the question is". Every repeat is
# bounded, so the cost is that of one pass.
_ANSWER_IS = re.compile(
    r"answer(?: (?:to|of|for) [^.:\n]{0,60}?)?[*_ \t]{0,4}(?:(?:is|equals)\b:?|[:=])", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\.\s")
_MATH_MODE = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_STATED = ("####", "\\boxed", "\\fbox", "<answer>")  # a column that holds one is a worked solution

_Place = tuple[int, str]  # where an answer starts, and its text


def extract_answer(text: str) -> str | None:
    """The final answer that a completion states, or None.

    Of the answers after "####" on a line, inside `\\boxed{}` or `\\fbox{}` (also `\\boxed 5`) and
    inside <answer></answer>, the one that starts last and is not blank. After "answer is",
    "answer:" and the like an answer counts only where there is neither box nor tag: prose after
    a box speaks of the answer without stating it. Only what follows the last </think> is read; a
    <think> that is never closed has no answer. Comes without surrounding spaces, dollar signs,
    asterisks and colons, the brackets of math mode, and the trailing period.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    places = [*_in_boxes(text), *_in_tags(text)]
    places += _after_marker(text) if places else [*_after_marker(text), *_after_phrase(text)]
    if not places:
        return None
    found = max(places)[1]
    inner = _after_phrase(found)  # <answer>The answer is 5</answer>
    return inner[0][1] if inner else found


def stated_answer(value: Any) -> str:
    """The answer that a value of the column `answer` holds: a number, a text, a worked solution.

    Raises ValueError, saying what is wrong, where it holds none.
    """
    if fault := answer_fault(value):
        raise ValueError(f"`answer` {fault}: {shown(value)}")
    text = str(value)
    return (extract_answer(text) if _is_solution(text) else text) or ""


def answer_fault(value: Any) -> str | None:
    """What keeps a value of the column `answer` from being an answer, or None."""
    if value is None:
        return "is null"
    if isinstance(value, bool) or not isinstance(value, (numbers.Number, str)):
        return f"is a {type(value).__name__}, not a number or text"
    is_whole = isinstance(value, int)  # of any length; floats cannot hold 10**400
    if isinstance(value, numbers.Real) and not is_whole and not math.isfinite(value):
        return "is not a finite number"
    text = str(value)
    if not text.strip():
        return "is blank"
    if _is_solution(text) and extract_answer(text) is None:
        mark = next(mark for mark in _STATED if mark in text)
        return f"holds {mark!r} with nothing after it" if mark == "####" else f"has an empty {mark}"
    return None if strip(text) else "holds nothing but punctuation"


def strip(text: str) -> str:
    """A text without what surrounds an answer: spaces, $, *, :, math mode, the last period."""
    text = text.strip(" \t\r\n$*:").rstrip(".").strip(" \t\r\n$*")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= 4:
            text = text[2:-2].strip()
    return text


def _is_solution(text: str) -> bool:
    return any(mark in text for mark in _STATED)


def _place(start: int, text: str) -> list[_Place]:
    text = strip(text)
    is_answer = text and "\\boxed" not in text and "\\fbox" not in text  # else an empty box
    return [(start, text)] if is_answer else []


def _after_marker(text: str) -> list[_Place]:
    start = text.rfind("####") + len("####")
    return _place(start, text[start:].partition("\n")[0]) if start >= len("####") else []


def _in_boxes(text: str) -> list[_Place]:
    """The box that opens last, of those that are closed and not blank; one pass over the braces."""
    open_braces: list[tuple[bool, int]] = []
    best: list[_Place] = []
    latest = -1
    for match in _BRACES.finditer(text):
        brace, place = match.group(), []
        if brace in ("\\{", "\\}"):
            continue
        if brace == "{" or brace.endswith("{"):
            open_braces.append((brace != "{", match.end()))
        elif brace != "}":
            if bare := _BARE.match(text, match.end()):
                place = _place(match.end(), bare[1].partition("$")[0])
        elif open_braces:
            is_box, start = open_braces.pop()
            # Boxes close inside out. A box around one that is done is no answer, and reading it
            # again would make the cost quadratic.
            if is_box and start > latest:
                place, latest = _place(start, text[start : match.start()]), start
        if place and (not best or place > best):
            best = place
    return best


def _in_tags(text: str) -> list[_Place]:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0)) + len("<answer>")
    return _place(start, text[start:end]) if start >= len("<answer>") else []


def _after_phrase(text: str) -> list[_Place]:
    last = None
    for last in _ANSWER_IS.finditer(text):  # noqa: B007
        pass
    if last is None:
        return []
    rest = text[last.end() :].lstrip(" :\t\n*")
    for opening, closing in _MATH_MODE:
        if rest.startswith(opening):
            end = rest.find(closing, len(opening))
            # "$5 and $6" is money: math has no space before its closing dollar.
            if end > len(opening) and (closing != "$" or not rest[end - 1].isspace()):
                return _place(last.end(), rest[len(opening) : end])
    line = rest.partition("\n")[0]
    return _place(last.end(), _SENTENCE_END.split(line, maxsplit=1)[0])
