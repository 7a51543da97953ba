"""Problems: a prompt, and the further columns that reward functions read.

A problem file is JSONL: one JSON object a line, with `prompt` (a text, or chat messages) and the
same further columns on every line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]  # chat: each with a "role" and a "content"

# Names that a reward function's own arguments have.
_RESERVED = ("prompts", "completions")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prompt and what its rewards may need to know."""

    prompt: str | Messages
    columns: dict[str, Any]
    where: str = dataclasses.field(default="", compare=False)  # file and row, for messages


def load_jsonl(path: str | Path, option: str) -> list[Problem]:
    """The problems of a JSONL file, in its order; blank lines are skipped.

    Raises ValueError, naming `option` (such as "data.path"), the file and the line, for a missing
    or empty file, a line that is no JSON object, a missing, blank or mistyped prompt, and a line
    whose columns differ from the first line's.
    """
    problems: list[Problem] = []
    first_line, first_columns = 0, set()
    for number, line in _lines(Path(path), option):
        where = f"{option}: {path}, line {number}"
        problem = _problem(line, where)
        columns = set(problem.columns)
        if not problems:
            first_line, first_columns = number, columns
        elif columns != first_columns:
            lacks, adds = sorted(first_columns - columns), sorted(columns - first_columns)
            changes = [f"lacks {', '.join(lacks)}"] * bool(lacks)
            changes += [f"adds {', '.join(adds)}"] * bool(adds)
            raise ValueError(
                f"{where} {' and '.join(changes)}, compared with line {first_line}. All lines need "
                "the same columns; write null where there is no value."
            )
        problems.append(problem)
    if not problems:
        raise ValueError(
            f"{option}: {path} is empty; it needs one JSON object with a prompt a line."
        )
    return problems


def _lines(path: Path, option: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank with their numbers from 1, read one at a time."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    # A byte-order mark, which some editors write, is not part of the first line.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{option}: {path}, line {number} is not UTF-8.") from error
                if text:
                    yield number, text
    except OSError as error:
        raise ValueError(f"{option}: cannot read {path}: {error.strerror}.") from error


def _problem(line: str, where: str) -> Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON ({error}): {_shorten(line)}. Each line needs one JSON object."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{where} is a {type(row).__name__}, not a JSON object: {_shorten(line)}. Write "
            '{"prompt": ..., "answer": ...}.'
        )
    if "prompt" not in row:
        raise ValueError(f"{where} has no `prompt`; it has {', '.join(row) or 'no columns'}.")
    taken = [name for name in _RESERVED if name in row]
    if taken:
        raise ValueError(
            f"{where} has a column `{taken[0]}`, which is an argument of every reward function. "
            "Rename the column."
        )
    prompt = row.pop("prompt")
    fault = _prompt_fault(prompt)
    if fault:
        raise ValueError(
            f"{where}: `prompt` {fault}: {_shorten(json.dumps(prompt))}. It must be a text, or a "
            'list of messages such as {"role": "user", "content": "..."}.'
        )
    return Problem(prompt, row)


def _prompt_fault(prompt: Any) -> str | None:
    """What is wrong with a prompt, or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is blank"
    if not isinstance(prompt, list):
        return f"is a {type(prompt).__name__}"
    for i, message in enumerate(prompt):
        if not isinstance(message, dict):
            return f"has a {type(message).__name__} as message {i}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"has no text as `{key}` of message {i}"
    return None if any(m["content"].strip() for m in prompt) else "holds no text"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
