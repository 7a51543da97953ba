"""Log files of a run that survive a full disk.

Records that cannot be written wait in memory. They are written first once there is space, so no
line is torn or missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.run import disk


class Log:
    """A file that records are appended to."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        """`say` gets the warnings."""
        self._path, self._say, self._waiting, self._told = path, say, bytearray(), False
        self._file = path.open("ab", buffering=0)  # a killed run loses at most one record

    def line(self, row: dict[str, Any]) -> None:
        """Appends an object as a line of JSON."""
        self.append(json.dumps(row).encode() + b"\n")

    def append(self, record: bytes) -> None:
        """Appends bytes, or keeps them in memory until there is space, and warns once."""
        self._waiting += record
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._told = False
        except OSError as error:
            if not disk.is_full(error):
                raise
            if not self._told:
                self._say(
                    f"warning: {self._path} cannot be written, the disk is full. The run goes on; "
                    "its lines are kept in memory until there is space."
                )
            self._told = True

    def close(self) -> None:
        """Closes the file; warns of bytes that could not be written."""
        self.append(b"")
        if self._waiting:
            size = disk.size(len(self._waiting))
            self._say(f"warning: the last {size} of {self._path} are lost, the disk is full.")
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log that have a "step"; a line torn by a crash is skipped."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
