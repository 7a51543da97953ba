"""Prints a run's summary on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_jax.messages.console import console, is_json

SHOWN = {  # labels and formats of the values in summary.json
    "accuracy_before": ("held-out accuracy before", "{:.1%}"),
    "accuracy_after": ("held-out accuracy after", "{:.1%}"),
    "held_out_reward_before": ("held-out reward before", "{:,.3f}"),
    "held_out_reward_after": ("held-out reward after", "{:,.3f}"),
    "steps": ("steps", "{:,}"),
    "train_wall_s": ("training time", "{:,.1f} s"),
    "generated_tokens_per_s": ("sampling speed", "{:,.0f} tokens/s"),
    "generated_tokens": ("tokens sampled", "{:,}"),
    "parameters": ("parameters", "{:,}"),
    "skipped_updates": ("updates skipped", "{:,}"),
    "roll_backs": ("roll-backs", "{:,}"),
    "seed": ("seed", "{}"),
    "export": ("export", "{}"),
    "curves": ("curves", "{}"),
}
_IF_ANY = ("skipped_updates", "roll_backs")  # not shown if 0


def summary_table(summary: Mapping[str, Any]) -> None:
    """Prints a run's summary in a box: numbers with units, then other values (paths) by name.

    Values that were not measured, and counts of 0, are left out. Nothing is printed if lines are
    JSON, since these have an event for it.
    """
    if is_json():
        return
    table = Table.grid(padding=(0, 2))
    for name in [n for n in SHOWN if n in summary] + [n for n in summary if n not in SHOWN]:
        value = summary[name]
        if value is None or (name in _IF_ANY and not value):
            continue
        label, form = SHOWN.get(name, (name.replace("_", " "), "{}"))
        text = Text(form.format(value), style="bold", overflow="fold")
        table.add_row(Text(label, style="dim"), text)
    console.print(Panel(table, title="Run finished", title_align="left", expand=False))
