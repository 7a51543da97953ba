"""The history of a run: its metrics by step, and its options."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.run.append_log import read_jsonl

Series = tuple[np.ndarray, np.ndarray]
"""Steps and values from the first to the last that is known; NaN where one between is not."""


@dataclasses.dataclass(frozen=True)
class History:
    """A run's metrics, in order of steps, and its options by dotted name ({} if unknown)."""

    name: str  # of its folder
    by_step: Mapping[int, Mapping[str, float | None]]
    options: Mapping[str, Any]
    date: str  # its start: 2026-11-29T05:56:32, or ""

    def names(self, prefix: str) -> list[str]:
        """Names of metrics that begin with `prefix`, in order of first occurrence."""
        rows = self.by_step.values()
        return list(dict.fromkeys(n for row in rows for n in row if n.startswith(prefix)))

    def series(self, name: str, *, among: str = "") -> Series:
        """A metric over the steps; `among`: only steps with a metric that begins so."""
        rows = self.by_step.items()
        steps = [s for s, row in rows if any(n.startswith(among) for n in row)]
        value = np.array([_number(self.by_step[s].get(name)) for s in steps], np.float64)
        step, known = np.array(steps, np.float64), np.flatnonzero(np.isfinite(value))
        if not len(known):
            return np.zeros(0), np.zeros(0)
        span = slice(known[0], known[-1] + 1)
        step, value = step[span], value[span]
        if among or len(step) < 3:
            return step, value
        # A step without a line has no data either.
        apart = np.flatnonzero(np.diff(step) > 1.5 * np.median(np.diff(step)))
        between = (step[apart] + step[apart + 1]) / 2
        return np.insert(step, apart + 1, between), np.insert(value, apart + 1, np.nan)

    def told(self) -> str:
        """Model, seed, length and date, as far as known."""
        facts = [_model(self.options)] if "model.path" in self.options else []
        if "seed" in self.options:
            facts.append(f"seed {self.options['seed']}")
        last = max(self.by_step)
        facts.append(f"{last:,} step{'s' * (last != 1)}")
        if self.date:
            facts.append(self.date[:16].replace("T", " "))
        return "   ·   ".join(facts)


def read(workdir: str | Path) -> History:
    """The history of a run. Raises ValueError if there are no metrics."""
    workdir = Path(workdir)
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"There is no {path}: {workdir} is not the folder of a run.")
    by_step: dict[int, dict[str, float | None]] = {}
    for row in read_jsonl(path):  # several lines of a step are merged
        by_step.setdefault(row["step"], {}).update(row)
    if not by_step:
        raise ValueError(f"{path} holds no metrics yet; a run writes them after its first step.")
    record = _record(workdir / "config.json")
    options, date = record.get("options", {}), str(record.get("date", ""))
    return History(workdir.resolve().name, dict(sorted(by_step.items())), options, date)


def mean_throughput(history: History) -> float:
    """Tokens sampled per second of sampling, over the run; 0 without measurements.

    Only logged steps count: for steps that were rolled back, neither tokens nor seconds do.
    """
    tokens = seconds = 0.0
    for row in history.by_step.values():
        rate, rollout_s = row.get("throughput/generated_tokens_per_s"), row.get("time/rollout_s")
        if rate is not None and rollout_s is not None:
            tokens, seconds = tokens + rate * rollout_s, seconds + rollout_s
    return tokens / seconds if seconds else 0.0


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _record(file: Path) -> dict[str, Any]:
    """The content of config.json; {} if it cannot be read, since curves do not need it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("options"), dict) else {}


def _model(options: Mapping[str, Any]) -> str:
    """A short name of the model: a hub id, or the end of a folder's path."""
    path = str(options["model.path"])
    if not path:
        layers, width = options.get("model.num_layers"), options.get("model.width")
        return f"new model, {layers} layers of width {width}"
    parts = Path(path).parts
    if len(parts) <= 2 and not path.startswith(("/", ".", "~")):
        return path
    return "/".join(parts[-2:] if parts[-1] == "export" else parts[-1:])
