"""Atomic writes: a file is written whole, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file atomically: after a crash, and for readers, it has the old content or the new.

    A text is written as UTF-8.
    """
    partial = file.with_name(file.name + ".new")
    data = content.encode() if isinstance(content, str) else content
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:  # a full disk: free the part's space
        partial.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object to a file, atomically."""
    write_whole(file, json.dumps(value, indent=1) + "\n")
