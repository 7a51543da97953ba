"""A run's folder, which belongs to one config and, while it runs, to one process.

config.json      options, date and sums of a run      evaluations/   every evaluated item
metrics.jsonl    scalars of every step                checkpoints/   Orbax
samples.jsonl    completions that were shown          export/        the trained model
events.out.*     both, for TensorBoard                summary.json, curves.png, curves.svg
run.lock         who holds the folder (`run/claim.py`)    saved.json     the newest checkpoint
fit.json         remat and microbatch size, if the run chose them by memory
source/          config and tokenizer files of the initial model, for the export
bootstrap/       the workdir of the supervised training of a new model
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpo_jax
from grpo_jax.hosts import processes
from grpo_jax.messages.console import say
from grpo_jax.run import disk
from grpo_jax.run.append_log import read_jsonl
from grpo_jax.run.whole_files import write_json


def note_saved(folder: Path, number: int | None) -> None:
    """Records the run's newest whole checkpoint in `saved.json`; None: it has none any more."""
    if number is None:
        (folder / "saved.json").unlink(missing_ok=True)
        return
    try:
        write_json(folder / "saved.json", {"checkpoint": number})
    except OSError as error:  # the checkpoint exists; the run goes on
        if not disk.is_full(error):
            raise


def begin(folder: Path, checkpoints: str, *, again: bool) -> None:
    """Prepares a start at step 0, as the folder `checkpoints` has no checkpoint.

    Raises ValueError if the run had one, unless it may begin `again`; then the old logs are
    renamed.
    """
    log, saved = folder / "metrics.jsonl", folder / "saved.json"
    steps = max((row["step"] for row in read_jsonl(log)), default=0) if log.exists() else 0
    if not saved.exists():
        if steps and processes.is_first():
            say(f"{folder} has no checkpoint yet: its {steps} steps are computed again.")
        return
    if not again:
        raise ValueError(
            f"{folder} holds a run of {steps} steps that has saved checkpoints, and {checkpoints} "
            "holds none. Is it mounted, and can its bucket be read? Bring them back, or begin at "
            "step 0 with --config.checkpoint.begin_again=True; the logs so far are then kept "
            "under other names."
        )
    if not processes.is_first():
        return
    number = 1
    while (folder / f"metrics_{number}.jsonl").exists():
        number += 1
    for name in ("metrics", "samples"):
        if (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").rename(folder / f"{name}_{number}.jsonl")
    saved.unlink()
    say(f"The run begins again at step 0. {folder}/metrics_{number}.jsonl has the old metrics.")


def note_export(export: Path, *, step: int, updates: int) -> None:
    """Process 0 records beside an exported model the run's step that it comes from."""
    if processes.is_first():
        facts = {"step": step, "updates": updates, "version": grpo_jax.__version__}
        write_json(export / "grpo_jax.json", facts)


def exported(export: Path) -> dict[str, Any] | None:
    """The record of `note_export`; None if there is no export, or one without a record."""
    try:
        return json.loads((export / "grpo_jax.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
