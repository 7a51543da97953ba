"""Opens a run's folder for a config."""

from __future__ import annotations

import re
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import record as record_lib
from grpo_jax.hosts import processes
from grpo_jax.run import claim
from grpo_jax.run.whole_files import write_json


def open_for(config: ConfigDict, folder: Path) -> Path:
    """The folder, created if needed and claimed; the first process records the config in it.

    The same for `checkpoint.folder`, if it is a local folder. Raises ValueError if the folder holds
    a run that this config cannot continue, is in use by another process, cannot be written, or is
    not the same for all processes. A run that ended before any result does not occupy its folder.
    """
    if re.match(r"\w{2,}:/", str(folder)):  # Path turns gs:// into gs:/
        raise ValueError(
            f"--workdir {folder} is no folder of this machine. Give one; checkpoint.folder alone "
            "may be an address such as gs://BUCKET/PATH."
        )
    record = folder / "config.json"
    if processes.is_first():
        _record(config, folder, record)
    processes.barrier("the opening of the workdir")
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


def _has_results(folder: Path) -> bool:
    log, saved = folder / "metrics.jsonl", folder / "checkpoints"
    if (log.exists() and log.stat().st_size > 0) or (saved.is_dir() and any(saved.iterdir())):
        return True
    return (folder / "bootstrap").is_dir() and _has_results(folder / "bootstrap")
