"""The work folder of programs where it is one of the disk: its size, and how it is emptied.

A program may nest folders deeper than Python can recurse, or close them to everybody.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil

_MAX_FILES = 1000


def empty(folder: str) -> None:
    """Removes all that is in a folder; what stands in a folder of it is first moved up."""
    numbers = itertools.count()
    while names := os.listdir(folder):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.islink(path) or not os.path.isdir(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                old, new = os.path.join(path, inner), os.path.join(folder, f".{next(numbers)}")
                if os.path.isdir(old) and not os.path.islink(old):
                    os.chmod(old, 0o700)
                while os.path.lexists(new):
                    new = os.path.join(folder, f".{next(numbers)}")
                os.rename(old, new)
            os.rmdir(path)


def remove(folder: str) -> None:
    """Removes a folder with all that is in it, as far as that can be done."""
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
        empty(folder)
    shutil.rmtree(folder, ignore_errors=True)


def holds_more(folder: str, most_bytes: int) -> bool:
    """Whether there are more bytes than that in a folder, or more than 1,000 files and folders."""
    size, number, todo = 0, 0, [folder]
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    number += 1
                    size += entry.stat(follow_symlinks=False).st_size
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    if size > most_bytes or number > _MAX_FILES:
                        return True
        except OSError:  # it has been removed, or closed
            continue
    return False
