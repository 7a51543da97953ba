"""Reward for the right letter of a multiple choice."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import extract_answer
from grpo_jax.rewards.completions import replies
from grpo_jax.rewards.exact import same_answer

_LETTERS = string.ascii_uppercase
_MARKS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s?\{([^{}]*)\}")
# B, (B), B) 42, B. 42, B: 42, "B - 42"; but not "A cat", nor "a.m."
_LETTER = re.compile(
    r"[\s*_$`\"'(\[]{0,9}([A-Za-z])[*_$`\"']{0,3}(?:[)\]:]|\.(?=\s|$)|\s-\s|\s{0,9}$)"
)
_MAX_LINE = 200  # characters of a line that may be a letter with its choice


def multiple_choice(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    choices: list[Any] | None = None,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion that chooses the letter of its row's answer, else 0.0.

    `answer` is a letter, also as in "(B)" or "B) Paris", or the number of the choice from 0. The
    final answer is read as by `exact_answer`; without one, the reply's last line counts if it is a
    letter, else its first. With a column `choices`, the list of a row's choices, the text of a
    choice stands for its letter, in `answer` too. Raises ValueError if `answer` names no choice.
    """
    texts = replies(prompts, completions, rendered_prompts)
    listed = choices if choices is not None else [None] * len(texts)
    rewards = []
    for text, value, row in zip(texts, answer, listed, strict=True):
        if fault := _fault(value, row):
            raise ValueError(f"`answer` {fault}: {value!r}")
        found = None if text is None else _chosen(text, row)
        rewards.append(float(found is not None and found == _letter_of(value, row)))
    return rewards


def letter_fault(value: Any) -> str | None:
    """The fault of a value of `answer` that can be no choice; None for one that may be."""
    if value is None:
        return "is null"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return f"is a {type(value).__name__}, not a letter or the number of a choice"
    if isinstance(value, int):
        return None if 0 <= value < len(_LETTERS) else "is no number of a choice, from 0 to 25"
    return None if value.strip() else "is blank"


multiple_choice.column_faults = {"answer": letter_fault}
multiple_choice.right_or_wrong = True
multiple_choice.options = ()


def _fault(value: Any, choices: Sequence[Any] | None) -> str | None:
    fault = letter_fault(value)
    if fault is None and _letter_of(value, choices) is None:
        return "names no choice"
    return fault


def _letter_of(value: int | str, choices: Sequence[Any] | None) -> str | None:
    if isinstance(value, int):
        return _LETTERS[value] if choices is None or value < len(choices) else None
    return _read(value, choices)


def _chosen(text: str, choices: Sequence[Any] | None) -> str | None:
    """The letter that a reply chooses, or None."""
    found = extract_answer(text)
    if found is not None:
        return _read(found, choices)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    ends = (lines[-1], lines[0]) if lines else ()
    return next((letter for line in ends if (letter := _read(line, choices))), None)


def _read(text: str, choices: Sequence[Any] | None) -> str | None:
    text = text.strip()[: _MAX_LINE + 1]
    if len(text) > _MAX_LINE:
        return None
    bare = _MARKS.sub(r"\1", text)
    for i, choice in enumerate(choices or ()):
        if i < len(_LETTERS) and same_answer(str(choice)[:_MAX_LINE], bare):
            return _LETTERS[i]
    match = _LETTER.match(bare)
    return match[1].upper() if match else None
