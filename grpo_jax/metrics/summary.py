"""A run's summary on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_jax.messages.console import console, is_json

_SUMMARY = {
    "accuracy_before": ("held-out accuracy before", "{:.1%}"),
    "accuracy_after": ("held-out accuracy after", "{:.1%}"),
    "held_out_reward_before": ("held-out reward before", "{:.3f}"),
    "held_out_reward_after": ("held-out reward after", "{:.3f}"),
    "num_steps": ("steps", "{:,}"),
    "train_wall_s": ("training time", "{:,.1f} s"),
    "generated_tokens_per_s": ("sampling speed", "{:,.0f} tokens/s"),
    "generated_tokens": ("tokens sampled", "{:,}"),
    "skipped_updates": ("updates skipped", "{:,}"),
    "roll_backs": ("roll-backs", "{:,}"),
    "mfu": ("of peak arithmetic", "{:.1%}"),
    "seed": ("seed", "{}"),
}


def summary_table(summary: Mapping[str, Any]) -> None:
    """Prints the end of a run in a box: known numbers with units, then the rest (paths) by name.

    Nothing where lines are JSON: the event has it.
    """
    if is_json():
        return
    table = Table.grid(padding=(0, 2))
    names = [n for n in _SUMMARY if n in summary] + [n for n in summary if n not in _SUMMARY]
    for name in names:
        label, form = _SUMMARY.get(name, (name.replace("_", " "), "{}"))
        value = summary[name]
        text = "-" if value is None else form.format(value)
        table.add_row(Text(label, style="dim"), Text(text, style="bold", overflow="fold"))
    console.print(Panel(table, title="Run finished", title_align="left", expand=False))
