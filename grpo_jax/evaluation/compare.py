"""Compares models: their metrics as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from grpo_jax.evaluation.estimates import Estimate, Tally
from grpo_jax.messages.progress import Progress

_POINTS = ("bleu",)  # metrics from 0 to 100; the others are shares
_TOKENS = ("length", "stopped_length")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One model's metrics, and the files of its completions."""

    path: str  # as given by --model
    name: str  # short name for the table and for files
    tallies: dict[str, Tally]
    files: dict[str, Path]


# --- The command line -----------------------------------------------------------------------------


def names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart, also as file names."""
    parts = [Path(path).parts for path in paths]
    shortest = 2 if any(p[-1] == "export" for p in parts) else 1
    for n in range(shortest, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]).lstrip("/") for p in parts]
        if len({file_name(name) for name in names}) == len(names):
            return names
    return [f"{i}_{Path(path).name}" for i, path in enumerate(paths, start=1)]


def file_name(name: str) -> str:
    return name.replace("/", "_")


# --- Evaluating -----------------------------------------------------------------------------------


class Counter:
    """Shows the number of answered problems: a bar on a terminal, elsewhere a line every 10 s."""

    def __init__(self, total: int, num_samples: int):
        """`num_samples` per problem; 0: the greedy completion."""
        self._done = 0
        kind = "greedy"
        if num_samples:
            kind = f"{num_samples} sample{'s' * (num_samples > 1)} each"
        self._bar = Progress(total, noun=f"{kind}: problem", every_s=10.0)

    def add(self) -> None:
        self._done += 1
        self._bar.update(self._done, {})

    def __enter__(self) -> Counter:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)


def powers(n: int) -> list[int]:
    """The powers of 2 up to n, and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


# --- Showing --------------------------------------------------------------------------------------


def _cell(metric: str, estimate: Estimate, *, signed: bool = False) -> str:
    if math.isnan(estimate.value):
        return "-"
    is_reward = metric.split("/")[0] == "reward"
    scale = 1 if is_reward or metric in (*_POINTS, *_TOKENS) else 100
    form = "+" * signed + (".3f" if is_reward else ".1f")
    value, low, high = (
        f"{scale * x:{form}}" for x in (estimate.value, estimate.low, estimate.high)
    )
    unit = "%" if scale == 100 and not signed else ""
    return f"{value}{unit} [{low}, {high}]"


def table(names: list[str], metrics: list[dict[str, Estimate]], differences: list[dict]) -> Table:
    """One row per metric, one column per model; accuracy and reward also as differences."""
    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(Text(name, overflow="fold"), justify="right")
    for metric in metrics[0]:
        if metric == "pass@1":  # rows above are of greedy completions, from here of samples
            table.add_section()
        label = metric.replace("_", " ") + (", tokens" if metric in _TOKENS else "")
        table.add_row(label, *(Text(_cell(metric, m[metric])) for m in metrics))
        if differences and (metric in ("accuracy", "reward") or metric.startswith("mean@")):
            cells = [Text(_cell(metric, d[metric], signed=True)) for d in differences]
            label = f"  difference to {names[0]}" + ", points" * (metric != "reward")
            table.add_row(Text(label, style="dim", overflow="fold"), "", *cells)
    return table


def as_json(estimates_by_name: dict[str, Estimate]) -> dict[str, Any]:
    return {
        name: {k: None if math.isnan(v) else v for k, v in dataclasses.asdict(estimate).items()}
        for name, estimate in estimates_by_name.items()
    }
