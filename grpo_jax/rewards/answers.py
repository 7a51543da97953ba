"""Extracts answers: from a completion, a worked solution, or a column of the data.

A completion may hold anything, a megabyte of braces included; every search here is one pass.
"""

from __future__ import annotations

import itertools
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.rewards.completions import after_thinking, begin_in_thinking, text_of

# \boxed{ and \fbox{ open a box; so does \boxed before a bare token. Escaped braces are text.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{|\\(?:boxed|fbox)(?![a-zA-Z{])|\\[{}]|[{}]")
_BARE = re.compile(r"\s{0,9}([^\s${}]\S{0,99})")
_PHANTOM = re.compile(r"\\phantom\s{0,9}\{[^{}]{0,99}\}")  # an empty box to fill in
# The text between the boxes of one list, and words that correct the earlier box.
_CLOSE, _NEAR = 10, 70  # characters, as in Math-Verify
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
_CORRECTION = re.compile(
    r"\b(?:rather|wait|no|not|instead|actually|correct\w*|wrong|sorry|mistake|(?:and|,) then)\b",
    re.IGNORECASE,
)
_MAX_BOXES = 16  # boxes of one list that are compared
# "answer is", "answer: ", "**Final Answer**:", "answer to the question is". All repetitions are
# bounded, so the cost is that of one pass.
_ANSWER_IS = re.compile(
    r"answer(?: (?:to|of|for) [^.:\n]{0,60}?)?[*_ \t]{0,4}(?:(?:is|equals)\b:?|[:=])", re.IGNORECASE
)
_HEADING = re.compile(
    r"^[#*_ \t]{1,9}(?:final[ \t]{1,9})?answer[*_: \t]{0,9}$", re.IGNORECASE | re.MULTILINE
)
# "The largest n is": the answer follows the first verb of a sentence.
_SUBJECT = re.compile(
    r"(?:the|it|its|this|our|so|thus|hence|therefore)\b(?:(?!\b(?:is|are|equals|not|if)\b).){1,99}"
    r"\b(?:is|are|equals)\b:?",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.\s")
_MATH_MODE = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_STATED = ("####", "\\boxed", "\\fbox", "<answer>")  # a column that holds one is a worked solution

_Place = tuple[int, str]  # where an answer starts, and its text
Same = Callable[[str, str], bool]  # whether two answers are equal


def extract_answer(text: str, thinking: bool = False, same: Same | None = None) -> str | None:
    """The final answer that a completion states, or None.

    An answer is the rest of a line after "####", the content of `\\boxed{}` or `\\fbox{}` (also
    `\\boxed 5`), or the content of <answer></answer>. The one that starts last and is not blank is
    taken. Adjacent boxes are one list: "2, 3" for `\\boxed{2}` and `\\boxed{3}`. A box that repeats
    a later one, literally or by `same`, is left out. Boxes are adjacent if fewer than 10 characters
    are between them, or fewer than 70 with a comma, a semicolon, "and" or "or". They are not if
    words between them correct the earlier one ("or rather", "no"). Text after "answer is",
    "answer:" and the like counts only if there is neither box nor tag, since prose after a box may
    mention the answer without stating it.

    Only the text after the last </think> is read. A <think> that is never closed has no answer, and
    neither has a completion that begins inside of `thinking` and does not close it.

    The result has no surrounding spaces, dollar signs, asterisks, backticks and colons, no brackets
    of math mode, and no trailing period.
    """
    text = after_thinking(text, thinking)
    if text is None:
        return None
    places = [*_in_boxes(text, same), *_in_tags(text)]
    places += _after_marker(text) if places else [*_after_marker(text), *_after_phrase(text)]
    if not places:
        return None
    found = max(places)[1]
    inner = _after_phrase(found)  # <answer>The answer is 5</answer>
    return inner[0][1] if inner else found


def right_or_wrong(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None,
    same: Same,
) -> list[float]:
    """1.0 for each completion whose extracted answer equals its row's by `same`, else 0.0.

    Raises ValueError, saying what is wrong, if `answer` holds no answer.
    """
    rewards = []
    thinking = begin_in_thinking(prompts, rendered_prompts)
    for completion, value, inside in zip(completions, answer, thinking, strict=True):
        expected = stated_answer(value, same)
        found = extract_answer(text_of(completion), inside, same)
        rewards.append(float(found is not None and same(expected, found)))
    return rewards


def stated_answer(value: Any, same: Same | None = None) -> str:
    """The answer in a value of the column `answer`: a number, a text or a worked solution.

    `same` as in `extract_answer`. Raises ValueError, saying what is wrong, if it holds no answer.
    """
    fault, answer = _stated(value, same)
    if fault:
        raise ValueError(f"`answer` {fault}: {shown(value)}")
    return answer


def answer_fault(value: Any) -> str | None:
    """The fault of a value of the column `answer` that holds no answer; None for a valid one."""
    return _stated(value, None)[0]


def _stated(value: Any, same: Same | None) -> tuple[str | None, str]:
    """The fault of a value without an answer, or None; and the answer."""
    if value is None:
        return "is null", ""
    if isinstance(value, bool) or not isinstance(value, (numbers.Number, str)):
        return f"is a {type(value).__name__}, not a number or text", ""
    is_whole = isinstance(value, int)  # any size is valid; a float could not hold 10**400
    if isinstance(value, numbers.Real) and not is_whole and not math.isfinite(value):
        return "is not a finite number", ""
    text = str(value)
    if not text.strip():
        return "is blank", ""
    mark = next((mark for mark in _STATED if mark in text), None)
    if mark is None:
        return None if strip(text) else "holds nothing but punctuation", text
    answer = extract_answer(text, same=same)
    if answer is None:
        nothing = f"holds {mark!r} with nothing after it"
        return nothing if mark == "####" else f"has an empty {mark}", ""
    return None, answer


def strip(text: str) -> str:
    """A text without the marks around an answer: spaces, $, *, `, :, math mode, the last period."""
    text = text.strip(" \t\r\n$*`:").rstrip(".").strip(" \t\r\n$*`")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= 4:
            text = text[2:-2].strip()
    return text


def _place(start: int, text: str) -> list[_Place]:
    text = strip(text)
    is_answer = text and "\\boxed" not in text and "\\fbox" not in text  # else an empty box
    return [(start, text)] if is_answer and not _PHANTOM.fullmatch(text) else []


def _after_marker(text: str) -> list[_Place]:
    start = text.rfind("####") + len("####")
    if start < len("####"):
        return []
    line = text[start:].partition("\n")[0]
    return [] if _HEADING.fullmatch(f"#{line}") else _place(start, line)


def _in_boxes(text: str, same: Same | None) -> list[_Place]:
    """The last list of boxes that are closed and not blank; one pass over the braces."""
    first = text.find("\\boxed") if "\\fbox" not in text else 0  # earlier braces do not matter
    if first < 0:
        return []
    open_braces: list[tuple[int, int]] = []  # start of the box, or -1; position after the brace
    boxes: list[tuple[int, int, str]] = []  # start, end, text
    latest = -1
    for match in _BRACES.finditer(text, first):
        brace, place, begin, end = match.group(), [], match.start(), match.end()
        if brace in ("\\{", "\\}"):
            continue
        if brace == "{" or brace.endswith("{"):
            open_braces.append((begin if brace != "{" else -1, match.end()))
        elif brace != "}":
            if bare := _BARE.match(text, end):
                token = bare[1].partition("$")[0]
                place, end = _place(begin, token), bare.start(1) + len(token)
        elif open_braces:
            begin, start = open_braces.pop()
            # Inner boxes close first. A box around a closed one is no answer, and reading its text
            # again would make the cost quadratic.
            if begin >= 0 and start > latest:
                place, latest = _place(begin, text[start : match.start()]), start
        if place and (not boxes or begin > boxes[-1][0]):
            boxes.append((begin, end, place[0][1]))
    return [(boxes[-1][0], _list(text, boxes, same))] if boxes else []


def _list(text: str, boxes: list[tuple[int, int, str]], same: Same | None) -> str:
    """The last box and the boxes adjacent to it, separated by commas."""
    answers = {boxes[-1][2]: None}
    for box, following in zip(boxes[-2::-1], boxes[:0:-1]):
        if not _stand_together(text[box[1] : following[0]]):
            break
        if box[2] in answers:
            continue
        compared = itertools.islice(answers, _MAX_BOXES if same else 0)
        if not any(same(box[2], answer) for answer in compared):
            answers[box[2]] = None
    return ", ".join(reversed(answers))


def _stand_together(between: str) -> bool:
    if len(between) >= _NEAR or _CORRECTION.search(between):
        return False
    return len(between) < _CLOSE or bool(_SEPARATOR.search(between))


def _in_tags(text: str) -> list[_Place]:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0)) + len("<answer>")
    return _place(start, text[start:end]) if start >= len("<answer>") else []


def _after_phrase(text: str) -> list[_Place]:
    if "answer" not in text.lower():
        return []
    last = None
    for phrase in (_ANSWER_IS, _HEADING):
        for match in phrase.finditer(text):
            last = match if last is None or match.end() > last.end() else last
    if last is None:
        return []
    rest = text[last.end() :].lstrip(" :\t\n*")
    sentence = _value(rest)
    if subject := _SUBJECT.match(sentence):  # Final answer: the largest n is 34
        sentence = _value(rest[subject.end() :].lstrip())
    return _place(last.end(), sentence)


def _value(rest: str) -> str:
    """The first value: the content of math mode, else the rest of the sentence or line."""
    for opening, closing in _MATH_MODE:
        if rest.startswith(opening):
            end = rest.find(closing, len(opening))
            # "$5 and $6" is money: math has no space before its closing dollar.
            if end > len(opening) and (closing != "$" or not rest[end - 1].isspace()):
                return rest[len(opening) : end]
    return _SENTENCE_END.split(rest.partition("\n")[0], maxsplit=1)[0]
