"""Callbacks of the program that started a run: called after each step, may end the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.run.stop import StopSignal


@dataclasses.dataclass(frozen=True)
class Step:
    """A finished step; step 0 is the evaluation of the initial model."""

    number: int
    metrics: dict[str, float]  # by name, as in metrics.jsonl
    samples: list[dict[str, Any]]  # samples of its completions, as in samples.jsonl
    workdir: Path
    _stop: StopSignal

    def stop(self) -> None:
        """Asks the run to stop: it saves and ends, and the same call of `train` continues it."""
        self._stop.ask("a callback")


Callback = Callable[[Step], None]


class Listeners:
    """Calls each callback once a step's metrics are known; the next step may have begun."""

    def __init__(self, functions: Sequence[Callback], workdir: Path, stop: StopSignal):
        self._functions, self._workdir, self._stop = tuple(functions), workdir, stop
        self._samples: dict[int, list[dict[str, Any]]] = {}  # by step, not yet reported

    def __bool__(self) -> bool:
        return bool(self._functions)

    def sampled(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Stores the samples of a step."""
        if self._functions:
            self._samples[step] = samples

    def finished(self, step: int, metrics: dict[str, float]) -> None:
        """Calls the callbacks for a step."""
        samples = self._samples.pop(step, [])
        for function in self._functions:
            function(Step(step, dict(metrics), list(samples), self._workdir, self._stop))
