"""Files that are written whole, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
