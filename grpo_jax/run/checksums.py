"""SHA-256 of every file of a folder, kept in it, and what has changed since.

`sha256.json` maps the path of each file, relative to the folder, to its size and sum. Folders may
be addresses that `epath` knows, as gs://BUCKET/PATH.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

NAME = "sha256.json"
_THREADS = 4  # hashing lets go of the interpreter's lock; a bucket answers several at once
_CHUNK = 1 << 22  # bytes


def write(folder: epath.Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """Records what the files of a folder are now, without those of the names in `leave_out`."""
    paths = [path for path in _files(folder) if path not in leave_out]
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(lambda path: _size_and_sum(folder / path), paths)
        known = {p: {"bytes": size, "sha256": text} for p, (size, text) in zip(paths, sums)}
    (folder / NAME).write_text(json.dumps(known, indent=1) + "\n")


def faults(
    folder: epath.Path, *, leave_out: tuple[str, ...] = (), part: int = 0, parts: int = 1
) -> list[str]:
    """What is wrong with the files of a folder, in a few words each; empty when nothing is.

    One of several processes may read only its `part` of `parts` of the files. What cannot be read
    raises OSError: nobody knows what is wrong with it.
    """
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return [f"{NAME} is missing"]
    except UnicodeDecodeError:
        return [f"{NAME} is damaged"]
    try:
        known = {path: (one["bytes"], one["sha256"]) for path, one in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        return [f"{NAME} is damaged"]
    there = {path for path in _files(folder) if path not in leave_out}
    found = [f"{path} is missing" for path in sorted(known.keys() - there)]
    found += [f"{path} does not belong there" for path in sorted(there - known.keys())]
    own = sorted(there & known.keys())[part::parts]
    with ThreadPoolExecutor(_THREADS) as threads:
        compared = threads.map(lambda path: _compared(folder, path, *known[path]), own)
        return found + [text for text in compared if text]


def _compared(folder: epath.Path, path: str, size: int, wanted: str) -> str:
    found, text = _size_and_sum(folder / path)
    if found < size:
        return f"{path} is truncated, {found:,} bytes of {size:,}"
    if (found, text) != (size, wanted):
        return f"{path} has changed: its SHA-256 is another"
    return ""


def _size_and_sum(file: epath.Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Every file under a folder but the record itself, by its path from there."""
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from _files(path, f"{name}/")
        elif name != NAME:
            yield name
