"""Functions of the program that started a run, which hear of each step and may end the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.run.stop import StopSignal


@dataclasses.dataclass(frozen=True)
class Step:
    """A finished step: 0 is the evaluation of the model as it was given."""

    number: int
    metrics: dict[str, float]  # by name, as in metrics.jsonl
    samples: list[dict[str, Any]]  # some of its completions, as in samples.jsonl
    workdir: Path
    _stop: StopSignal

    def stop(self) -> None:
        """Asks the run to stop: it saves and ends, and the same call of `train` continues it."""
        self._stop.ask("a callback")


Callback = Callable[[Step], None]


class Listeners:
    """Calls each function once the metrics of a step are known; the next one may be under way."""

    def __init__(self, functions: Sequence[Callback], workdir: Path, stop: StopSignal):
        self._functions, self._workdir, self._stop = tuple(functions), workdir, stop
        self._samples: dict[int, list[dict[str, Any]]] = {}  # by step, of those not told yet

    def __bool__(self) -> bool:
        return bool(self._functions)

    def sampled(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Takes the samples of a step."""
        if self._functions:
            self._samples[step] = samples

    def finished(self, step: int, metrics: dict[str, float]) -> None:
        """Tells of a step."""
        samples = self._samples.pop(step, [])
        for function in self._functions:
            function(Step(step, dict(metrics), list(samples), self._workdir, self._stop))
