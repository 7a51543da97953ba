"""The files that a process writes, from Python's audit events."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.font_manager  # noqa: F401, at its first import it writes into the home folder

# Positions, in an event's arguments, of the changed paths and of the open folders they are relative
# to.
_CHANGED = {
    "os.mkdir": [(0, 2)], "os.rename": [(0, 2), (1, 3)], "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)], "os.link": [(1, 3)], "os.symlink": [(1, 2)], "os.truncate": [(0, None)],
    "os.chmod": [(0, 2)], "os.utime": [(0, 3)],
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_found: set[str] | None = None  # an audit hook cannot be removed
_is_hooked = False


@contextlib.contextmanager
def writes() -> Iterator[set[str]]:
    """While entered, a set gets the absolute paths that Python code makes, writes or removes."""
    global _found, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)
        _is_hooked = True
    _found = set()
    try:
        yield _found
    finally:
        _found = None


def outside(paths: set[str], *folders: Path) -> list[str]:
    """Paths outside of all these folders, without Python's module caches."""
    return sorted(
        p
        for p in paths
        if p != os.devnull
        and "/__pycache__/" not in f"{p}/"
        and not any(Path(p).is_relative_to(folder) for folder in folders)
    )


def _hook(event: str, arguments: tuple) -> None:
    if _found is None:
        return
    if event == "open":
        path, _, flags = arguments
        changed = [(path, -1)] if flags & _WRITING else []
    else:
        places = _CHANGED.get(event, ())
        changed = [(arguments[i], -1 if j is None else arguments[j]) for i, j in places]
    for path, folder in changed:
        if isinstance(path, (str, bytes, os.PathLike)):  # an integer is a file that is already open
            base = f"/proc/self/fd/{folder}" if folder >= 0 else ""
            _found.add(os.path.realpath(os.path.join(base, os.fsdecode(path))))
