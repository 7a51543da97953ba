"""A table of completions on the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table
from rich.text import Text

from grpo_jax.messages import console
from grpo_jax.messages.values import cut

_MAX_EXTRA_CHARS = 40  # of what a reward function added to a sample: texts keep their width


def print_samples(title: str, rows: list[dict[str, Any]], max_chars: int = 600) -> None:
    """Prints a table of completions (the keys stand at the top of this module).

    Texts are shown as they are, with control characters spelled out, and cut in their middle to
    `max_chars`: beginning and answer stay. What reward functions added is cut to a line of its own.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=4, overflow="fold")
    table.add_column("", no_wrap=True)  # one column of facts leaves the texts their width
    for row in rows:
        texts = [
            Text(console.printable(console.cut_middle(row[t], max_chars)))
            for t in ("prompt", "completion")
        ]
        extras = [
            cut(" ".join(f"{name} {value}".split()), _MAX_EXTRA_CHARS)
            for name, value in row.get("extras", {}).items()
        ]
        table.add_row(*texts, Text(console.printable("\n".join(facts(row) + extras))))
    console.console.print(table)


def facts(row: dict[str, Any]) -> list[str]:
    """What a sample earned, in words."""
    facts = [f"{name} {_number(value)}" for name, value in row["rewards"].items()]
    if "advantage" in row:
        facts += [f"advantage {_number(row['advantage'])}", f"{row['length']} tokens"]
    return facts


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
