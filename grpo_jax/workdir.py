"""A run's folder, which belongs to one config and, while it runs, to one process.

config.json      options, date and sums of a run      evaluations/   every evaluated item
metrics.jsonl    scalars of every step                checkpoints/   Orbax
samples.jsonl    completions that were shown          export/        the trained model
tensorboard/     both, for TensorBoard                summary.json, curves.png
run.lock         who holds the folder (`claim.py`)    saved.json     the newest checkpoint
fit.json         how an update was cut to the memory, where that was left open
source/          config and tokenizer files of the model that it began with, for the export
bootstrap/       the same for the supervised training of a new model
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import grpo_jax
from grpo_jax import claim, disk, hosts
from grpo_jax import record as record_lib
from grpo_jax.metrics import read_jsonl, say


def open_for(config: ConfigDict, folder: Path) -> Path:
    """The folder, made if need be and claimed, with the config recorded in it by the first process.

    So is `checkpoint.folder`, where it is one of this machine. Raises ValueError when it holds the
    run of a config that this one cannot continue, is in use by another process, cannot be written,
    or is not the same for all processes. A run that ended before it had computed anything does not
    hold its folder.
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


def _record(config: ConfigDict, folder: Path, file: Path) -> None:
    kept = config.checkpoint.folder
    try:
        for claimed in [folder, *([Path(kept)] if kept and "://" not in kept else [])]:
            claimed.mkdir(parents=True, exist_ok=True)
            claim.take(claimed)
        goes_on = file.exists() and _has_results(folder)
        text = record_lib.continued(file, config) if goes_on else record_lib.new(config)
        if text is not None:
            write_json(file, text)
    except OSError as error:
        what = f"--workdir {folder}" + f" or checkpoint.folder {kept}" * bool(kept)
        raise ValueError(f"{what} cannot be written: {error.strerror}.") from error


def accepted(folder: Path) -> tuple[str, ...]:
    """Options with which the run has gone on though it was started with others."""
    file = folder / "config.json"
    noted = record_lib.read(file).get("changes", []) if file.exists() else []
    return tuple(change["option"] for change in noted)


def _has_results(folder: Path) -> bool:
    log, saved = folder / "metrics.jsonl", folder / "checkpoints"
    if (log.exists() and log.stat().st_size > 0) or (saved.is_dir() and any(saved.iterdir())):
        return True
    return (folder / "bootstrap").is_dir() and _has_results(folder / "bootstrap")


# --- Runs whose checkpoints are gone --------------------------------------------------------------


def note_saved(folder: Path, number: int | None) -> None:
    """Notes the newest checkpoint of the run, whole by now; None: it has none any more."""
    if number is None:
        (folder / "saved.json").unlink(missing_ok=True)
        return
    try:
        write_json(folder / "saved.json", {"checkpoint": number})
    except OSError as error:  # the checkpoint is there; a run does not end for this
        if not disk.is_full(error):
            raise


def begin(folder: Path, checkpoints: str, *, again: bool) -> None:
    """What must hold where a run begins, as `checkpoints`, a folder, has none.

    Raises ValueError where it had one, unless it may begin `again`; then its logs are kept under
    other names.
    """
    log, saved = folder / "metrics.jsonl", folder / "saved.json"
    steps = max((row["step"] for row in read_jsonl(log)), default=0) if log.exists() else 0
    if not saved.exists():
        if steps and hosts.is_first():
            say(f"{folder} has no checkpoint yet: its {steps} steps are computed again.")
        return
    if not again:
        raise ValueError(
            f"{folder} holds a run of {steps} steps that has saved checkpoints, and {checkpoints} "
            "holds none. Is it mounted, and can its bucket be read? Bring them back, or begin at "
            "step 0 with --config.checkpoint.begin_again=True; what is logged so far is then kept "
            "under other names."
        )
    if not hosts.is_first():
        return
    number = 1
    while (folder / f"metrics_{number}.jsonl").exists():
        number += 1
    for name in ("metrics", "samples"):
        if (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").rename(folder / f"{name}_{number}.jsonl")
    saved.unlink()
    say(f"The run begins again at step 0. {folder}/metrics_{number}.jsonl has what was logged.")


def note_export(export: Path, *, step: int, updates: int) -> None:
    """Writes beside an exported model which step of the run it is of; the first process does."""
    if hosts.is_first():
        facts = {"step": step, "updates": updates, "version": grpo_jax.__version__}
        write_json(export / "grpo_jax.json", facts)


def exported(export: Path) -> dict[str, Any] | None:
    """What `note_export` wrote; None where there is no export, or one that nobody knows of."""
    try:
        return json.loads((export / "grpo_jax.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# --- Files ----------------------------------------------------------------------------------------


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
