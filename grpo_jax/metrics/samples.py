"""Prints a table of completions on the terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from grpo_jax.messages import console
from grpo_jax.messages.values import cut

_MAX_EXTRA_CHARS = 40  # of a value that a reward function added: leaves the width to texts
_MAX_COLUMNS = 4  # of a problem


def print_samples(title: str, rows: list[dict[str, Any]], max_chars: int = 600) -> None:
    """Prints a table of completions (`writers.py` describes their keys).

    A prompt and its columns are printed once, before its completions. Control characters in texts
    are spelled out. Long texts are cut in their middle to `max_chars`, so that beginning and answer
    stay. Values that reward functions added are cut to one line each.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("text", ratio=1, overflow="fold")
    table.add_column("what it is or earned", no_wrap=True)  # leaves the width to texts
    for about, texts in by_question(rows):
        for name, text in about.items():
            table.add_row(
                _shown(text, max_chars), Text(console.printable(_line(name))), style="dim"
            )
        for row in texts:
            extras = [_line(f"{name} {value}") for name, value in row.get("extras", {}).items()]
            earned = "\n".join(facts(row) + extras) or "completion"  # given ones earn nothing
            earned = Text(console.printable(earned))
            table.add_row(_shown(row["completion"], max_chars), earned)
    console.console.print(table)


def by_question(
    rows: list[dict[str, Any]],
) -> Iterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Groups consecutive samples of one prompt: prompt, columns by name, and samples."""
    for _, group in itertools.groupby(rows, lambda row: (row["prompt"], row.get("columns"))):
        group = list(group)
        columns = list(group[0].get("columns", {}).items())[:_MAX_COLUMNS]
        yield {"prompt": group[0]["prompt"]} | {n: str(value) for n, value in columns}, group


def _shown(text: str, max_chars: int) -> Text:
    return Text(console.printable(console.cut_middle(text, max_chars)))


def _line(text: str) -> str:
    return cut(" ".join(text.split()), _MAX_EXTRA_CHARS)


def facts(row: dict[str, Any]) -> list[str]:
    """A sample's rewards, advantage and length, as text."""
    facts = [f"{name} {_number(value)}" for name, value in row["rewards"].items()]
    if "advantage" in row:
        facts += [f"advantage {_number(row['advantage'])}", f"{row['length']} tokens"]
    return facts


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
