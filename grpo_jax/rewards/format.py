"""Reward for stating the answer where it can be found, right or wrong."""

from __future__ import annotations

from typing import Any


def answer_format(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1.0 for each completion whose last line, and no other place, says "#### answer", else 0.0.

    Text may stand before the marker on that line. Blank lines after it are no offence.
    """
    return [float(_is_well_formed(completion)) for completion in completions]


def _is_well_formed(completion: str) -> bool:
    _, marker, answer = completion.rstrip().partition("####")
    answer = answer.strip(" \t") if marker else ""
    return bool(answer) and "####" not in answer and "\n" not in answer and answer[0] != "#"
