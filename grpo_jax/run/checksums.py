"""Records the SHA-256 of every file in a folder, and finds later changes.

`sha256.json` in the folder maps each file's relative path to its size and sum. A folder may be an
address that `epath` knows, as gs://BUCKET/PATH.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

NAME = "sha256.json"
_THREADS = 4  # hashing releases Python's lock; buckets serve requests in parallel
_CHUNK = 1 << 22  # bytes


def write(folder: epath.Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """Records size and SHA-256 of a folder's files, except those named in `leave_out`."""
    paths = [path for path in _files(folder) if path not in leave_out]
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(lambda path: _size_and_sum(folder / path), paths)
        known = {p: {"bytes": size, "sha256": text} for p, (size, text) in zip(paths, sums)}
    (folder / NAME).write_text(json.dumps(known, indent=1) + "\n")


def faults(
    folder: epath.Path, *, leave_out: tuple[str, ...] = (), part: int = 0, parts: int = 1
) -> list[str]:
    """The faults of a folder's files, in a few words each; empty if there are none.

    One of several processes may read only its `part` of `parts` of the files. A file that cannot be
    read raises OSError, since it may be whole.
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
    """The relative paths of all files in a folder, except the record itself."""
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from _files(path, f"{name}/")
        elif name != NAME:
            yield name
