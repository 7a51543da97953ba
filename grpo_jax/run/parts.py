"""A file of rows that is written in parts: a program that is killed goes on with the next part.

Each part is a file in a folder beside the result, written whole or not at all. Once all are there,
they become the result, in their order, and the folder is removed. So no row is lost or repeated,
wherever the program ends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.run.whole_files import write_json, write_whole

KINDS = (".jsonl", ".parquet")
_SETTINGS = "settings.json"


def settings_of(out: Path) -> dict[str, Any]:
    """The settings that the parts of a file were begun with; none if they were not."""
    try:
        return json.loads((_folder(out) / _SETTINGS).read_text(encoding="utf-8"))
    except OSError:
        return {}


def _folder(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


class Parts:
    """The parts of one file. Begun by the same settings, it is continued."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        """Opens `out`'s folder of parts, or makes it.

        `settings`: JSON values that the rows follow from. Raises ValueError if `out` is of no known
        kind, exists, or was begun with other settings; the message names the difference.
        """
        self.out, self.folder = out, _folder(out)
        if out.suffix not in KINDS:
            raise ValueError(f"--out {out} must end in {' or '.join(KINDS)}.")
        if out.exists() and not self.folder.exists():
            raise ValueError(f"--out {out} exists. Remove it, or name another file.")
        settings = json.loads(json.dumps(settings))
        if before := settings_of(out):
            other = [n for n in {**before, **settings} if before.get(n) != settings.get(n)]
            if other:
                raise ValueError(
                    f"{self.folder} holds parts that were made with other settings: "
                    f"{', '.join(sorted(other))}. Go on with the same ones, remove the folder, or "
                    "name another --out."
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be made: {error.strerror}.") from error
        write_json(self.folder / _SETTINGS, settings)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"

    def has(self, number: int) -> bool:
        """Whether a part is there, whole."""
        return self._file(number).exists()

    def write(self, number: int, rows: Sequence[dict[str, Any]], told: dict[str, int]) -> None:
        """Writes a part; `told`: counts that `finish` sums up."""
        lines = [json.dumps({"told": told}), *(json.dumps(row) for row in rows)]
        write_whole(self._file(number), "\n".join(lines) + "\n")

    def finish(self, number: int) -> tuple[int, dict[str, int]]:
        """Makes the result of `number` parts; returns its rows, and the sums of what was told."""
        told: dict[str, int] = {}
        for i in range(number):
            with self._file(i).open(encoding="utf-8") as file:
                for name, count in json.loads(file.readline())["told"].items():
                    told[name] = told.get(name, 0) + count
        partial = self.out.with_name(self.out.name + ".new")
        write = _write_parquet if self.out.suffix == ".parquet" else _write_jsonl
        rows = write(partial, self._lines(number))
        os.replace(partial, self.out)
        done = self.folder.with_name(self.folder.name + ".done")  # or its parts would seem to lack
        os.replace(self.folder, done)
        shutil.rmtree(done, ignore_errors=True)
        return rows, told

    def _lines(self, number: int) -> Iterator[str]:
        for i in range(number):
            with self._file(i).open(encoding="utf-8") as file:
                next(file)
                yield from file


def _write_jsonl(path: Path, lines: Iterator[str]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _write_parquet(path: Path, lines: Iterator[str]) -> int:
    import pyarrow
    from pyarrow import parquet

    rows = [json.loads(line) for line in lines]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return len(rows)
