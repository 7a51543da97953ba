"""Writes a run's metrics and samples to files.

A run's folder holds `metrics.jsonl` and `samples.jsonl`, one JSON object a line with its "step",
and TensorBoard events beside them. A sample is a dict with `prompt` and `completion` (texts),
`columns` (of its problem, texts), `rewards` (by reward, None if it gave none), `advantage`,
`length` (tokens) and `extras` (values that reward functions added).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.messages.console import say, visible
from grpo_jax.metrics import samples
from grpo_jax.metrics import trackers as trackers_lib
from grpo_jax.metrics.names import describe, is_known
from grpo_jax.metrics.tensorboard import EventLog
from grpo_jax.run.append_log import Log, read_jsonl


class Writers:
    """Writes a run's metrics and samples to its folder, to TensorBoard and to trackers.

    `first_step` is the first step that this process will write. Lines of that step or later, which
    an earlier process wrote before it was killed, are dropped, so a resumed run has no step twice.
    For samples, `first_sample_step` applies if given. With `enabled` False nothing is written or
    read (only process 0 writes). `trackers.check` checks the options of `trackers`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        tensorboard: bool,
        trackers: trackers_lib.Asked,
        config: dict[str, Any],
        first_sample_step: int | None = None,
        enabled: bool = True,
    ):
        self._enabled = enabled
        self._metrics = self._samples = self._board = None
        self._trackers: list[trackers_lib.Sent] = []
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._metrics = _reopen(workdir / "metrics.jsonl", first_step)
        self._samples = _reopen(
            workdir / "samples.jsonl",
            first_step if first_sample_step is None else first_sample_step,
        )
        if tensorboard:
            self._board = EventLog(workdir, first_step, say)
            self._board.text("run", _options(workdir.resolve().name, config), first_step)
        self._trackers = trackers_lib.start(trackers, workdir, config)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a step's metrics, all named in METRICS. JSON gets null for NaN and inf."""
        unknown = [name for name in values if not is_known(name)]
        assert not unknown, f"METRICS does not describe {unknown}"
        if not self._enabled:
            return
        floats = {name: float(value) for name, value in values.items()}
        finite = {n: v if math.isfinite(v) else None for n, v in floats.items()}
        self._metrics.line({"step": int(step)} | finite)
        if self._board:
            for name, value in floats.items():
                self._board.scalar(name, value, step, describe(name))
        for tracker in self._trackers:
            tracker.log(int(step), floats)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes some completions of a step (see the keys at the top of this module)."""
        if not self._enabled:
            return
        for row in rows:
            self._samples.line({"step": int(step)} | row)
        if self._board:
            self._board.text("samples", _markdown(rows), step)
        for tracker in self._trackers:
            tracker.samples(int(step), rows)

    def close(self) -> None:
        """Closes the files; later writes fail."""
        for file in (self._metrics, self._samples, self._board, *self._trackers):
            if file:
                file.close()


def _reopen(path: Path, first_step: int) -> Log:
    """The log, opened for appending, after removal of its lines of `first_step` or later."""
    if path.exists():
        kept = path.with_name(path.name + ".new")
        with kept.open("w", encoding="utf-8") as file:
            for row in read_jsonl(path):
                if row["step"] < first_step:
                    file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(kept, path)
    return Log(path, say)


def _options(name: str, config: Mapping[str, Any]) -> str:
    """A run's name and options for TensorBoard, which names runs only by folder."""
    options = "\n".join(f"{option} = {value!r}" for option, value in config.items())
    return _as_code(name, options)


def _markdown(rows: list[dict[str, Any]]) -> str:
    """Samples for TensorBoard, with texts as indented code, so that no character acts as markup.

    A prompt is written once, before its completions.
    """
    parts = []
    for about, texts in samples.by_question(rows):
        parts += [_as_code(name, text) for name, text in about.items()]
        for row in texts:
            parts.append("**" + " · ".join(samples.facts(row)) + "**")
            further = {"completion": row["completion"]} | row.get("extras", {})
            parts += [_as_code(name, text) for name, text in further.items()]
    return "\n\n".join(parts)


def _as_code(title: str, text: Any) -> str:
    title = re.sub(r"[^\w .-]", "?", title)  # of a column or an added value
    return f"{title}:\n\n" + "\n".join(f"    {line}" for line in visible(str(text)).split("\n"))
