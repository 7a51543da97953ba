"""A run's folder, which belongs to one config, and the asking of a run to stop.

config.json      options, date and sums of a run      evaluations/   every evaluated item
metrics.jsonl    scalars of every step                checkpoints/   Orbax
samples.jsonl    completions that were shown          export/        the trained model
tensorboard/     both, for TensorBoard                summary.json, curves.png
fit.json         how an update was cut to the memory, where that was left open
source/          config and tokenizer files of the model that it began with, for the export
bootstrap/       the same for the supervised training of a new model
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import config as config_lib
from grpo_jax import definitions, hosts, options


def open_for(config: ConfigDict, folder: Path) -> Path:
    """The folder, made if need be, with the config recorded in it by the first process.

    Raises ValueError when it holds the run of a config that this one cannot continue, cannot be
    written, or is not the same for all processes. A run that ended before it had computed anything
    does not hold its folder.
    """
    if re.match(r"\w{2,}:/", str(folder)):  # what Path makes of gs://
        raise ValueError(
            f"--workdir {folder} is no folder of this machine. Give one; checkpoint.folder alone "
            "may be an address such as gs://BUCKET/PATH."
        )
    record = folder / "config.json"
    if hosts.is_first():
        _record(config, folder, record)
    hosts.meet("the opening of the workdir")
    if not config.checkpoint.folder and not record.exists():
        raise ValueError(
            f"--workdir {folder} of this host is not that of process 0: what that one wrote is not "
            "there. Give all a folder of a file system that they share, or set checkpoint.folder "
            "to one, such as gs://BUCKET/PATH."
        )
    return folder


def _record(config: ConfigDict, folder: Path, record: Path) -> None:
    if record.exists() and _has_results(folder):
        config_lib.refuse_other_config(config, record)
        return
    facts = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "definitions": definitions.in_force(config),
        "binding": config_lib.binding(config),
        "options": options.flatten(config),
    }
    text = json.dumps(facts, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, text + "\n")
    except OSError as error:
        raise ValueError(f"--workdir {folder} cannot be written: {error.strerror}.") from error


def _has_results(folder: Path) -> bool:
    log, saved = folder / "metrics.jsonl", folder / "checkpoints"
    if (log.exists() and log.stat().st_size > 0) or (saved.is_dir() and any(saved.iterdir())):
        return True
    return (folder / "bootstrap").is_dir() and _has_results(folder / "bootstrap")


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, finds the old text or the new, never a part."""
    partial = file.with_name(file.name + ".new")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:  # a full disk: what little there is of it is space for others
        partial.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: dict[str, Any]) -> None:
    """One JSON object as a file, written whole."""
    write_whole(file, json.dumps(value, indent=1) + "\n")


_STARTED = time.monotonic()  # of the program, but for a few seconds of imports


class Stopped(Exception):  # noqa: N818  (not an error)
    """The run was asked to stop, and has saved what it needs to continue."""


class StopSignal:
    """SIGTERM, SIGUSR1, Ctrl-C or the end of its time, noted: the run saves at the next boundary.

    A context manager: outside it the signals do what they did before. A second Ctrl-C ends the
    program at once.
    """

    def __init__(self, save_before_s: float = 0.0) -> None:
        """`save_before_s`: after the program's start the time is over; 0: never."""
        self.name = ""  # of the signal that all know of
        self._own = ""  # of what this process was sent
        self._save_before_s = save_before_s

    def __enter__(self) -> StopSignal:
        self._before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether any process got a signal or is out of time; all must ask, and hear the same."""
        over = self._save_before_s and time.monotonic() - _STARTED >= self._save_before_s
        if over and not self._own:
            self._own = f"checkpoint.save_before_s = {self._save_before_s:g}"
        if not self.name:
            self.name = hosts.first_of(self._own)
        return bool(self.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._own and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = signal.Signals(number).name
