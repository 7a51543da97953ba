"""Where the devices' time went in a trace that `config.profile.steps` wrote.

    python -m grpo_jax.profile --workdir DIR [--top 10]

prints, for each phase that the programs name, the operations that took longest, the part of the
network that each belongs to, and what all others took together. Times are those of an operation
alone, without the operations inside it (a loop's body), summed over devices and calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo_jax.config import parsers
from grpo_jax.messages.console import console
from grpo_jax.metrics import trace


def print_table(entries: list[Mapping[str, Any]]) -> None:
    for phase in dict.fromkeys(entry["phase"] for entry in entries):
        own = [entry for entry in entries if entry["phase"] == phase]
        total = sum(entry["seconds"] for entry in own)
        table = Table(title=f"{phase}: {total:.4f} s on devices", title_justify="left")
        for name, justify in (("operation", "left"), ("part", "left"), ("program", "left")):
            table.add_column(name, justify=justify, overflow="fold")
        for name in ("calls", "ms", "share"):
            table.add_column(name, justify="right", no_wrap=True)
        for entry in own:
            table.add_row(
                entry["name"],
                entry["part"],
                entry["program"].removeprefix("jit_"),
                f"{entry['calls']:,}",
                f"{1e3 * entry['seconds']:,.3f}",
                f"{entry['share']:.1%}",
            )
        console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Prints the table of `--workdir`; ends with one line if there is no trace."""
    parser = parsers.profile()
    options = parser.parse_args(argv)
    try:
        print_table(
            trace.rows(trace.operations(trace.newest_trace(Path(options.workdir))), options.top)
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
