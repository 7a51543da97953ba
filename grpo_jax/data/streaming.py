"""Streams: rows of a source that does not fit into memory, one after the other, shuffled nearby.

A window of `data.shuffle_buffer` rows is read at once, and given in a random order. The files of a
source are read in another order in each epoch. All follows from the seed: what a step gets from the
number of its draw. A `Place` says where the window of a draw begins, by the byte of a text file or
the row of a table, so that a run that goes on does not read what comes before. While a window is
used, a thread reads the next.
"""

from __future__ import annotations

import abc
import concurrent.futures
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.data import given, sources, streams, tables
from grpo_jax.data.sources import Padded, Row, Source

_AT_ONCE = 1000  # rows that are texts at the same time
_PATIENCE_S = 20.0  # for a window that is being read and will not be used


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A place in a source."""

    part: int = 0  # in the order of an epoch
    row: int = 0  # rows (of JSONL: lines) of the part that were read
    at: Any = None  # where they end: a byte of a text file, or the state of a hub dataset


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a source, or a source that is no file."""

    kind: str  # "jsonl", "csv", "parquet", "arrow", "saved", "hub" or "rows"
    path: str
    where: str  # for messages
    source: Source


def parts(source: Source) -> list[Part]:
    """The files of a source, in its order. Raises ValueError as `sources.read` does."""
    if source.path.startswith(given.PREFIX):
        if hasattr(given.find(source.path), "load_state_dict"):  # a `datasets.IterableDataset`
            return [Part("hub", source.path, source.path.removeprefix(given.PREFIX), source)]
        return [Part("rows", source.path, source.path.removeprefix(given.PREFIX), source)]
    files = sources.files(source)
    if files is None:
        return [Part("hub", source.path, source.path, source)]
    if files and files[0].is_dir():  # of `save_to_disk`
        inner = sources.saved_files(files[0])
        if inner is None:
            return [Part("saved", str(files[0]), source.path, source)]
        return [Part("arrow", str(file), str(file), source) for file in inner]
    kind = lambda file: {".json": "rows"}.get(file.suffix, file.suffix[1:])  # noqa: E731
    return [Part(kind(file), str(file), str(file), source) for file in files]


class Reader:
    """The rows of a source from a cursor on, with the files in the order of their numbers."""

    def __init__(self, found: Sequence[Part], order: Sequence[int], cursor: Cursor):
        self._parts, self._order, self._cursor = found, order, cursor
        self._open: _Open | None = None

    @property
    def cursor(self) -> Cursor:
        """Where the next row lies."""
        if self._open is None:
            return self._cursor
        return Cursor(self._cursor.part, self._open.row, self._open.at())

    def take(self, count: int) -> list[Row]:
        """The next rows, fewer at the end of the source."""
        found: list[Row] = []
        while len(found) < count and self._cursor.part < len(self._order):
            if self._open is None:
                part = self._parts[self._order[self._cursor.part]]
                self._open = _OPEN[part.kind](part, self._cursor)
            some = self._open.take(count - len(found))
            found += some
            if not some:
                self.close()
                self._cursor = Cursor(self._cursor.part + 1)
        return found

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


# --- Kinds of parts -------------------------------------------------------------------------------


class _Open(abc.ABC):
    """A part that is being read."""

    def __init__(self, part: Part, cursor: Cursor):
        self.part, self.row = part, cursor.row
        self.option = part.source.options[0]
        self._rows = self.read(cursor)

    @abc.abstractmethod
    def read(self, cursor: Cursor) -> Iterator[Row]:
        """The rows from the cursor on."""

    def at(self) -> Any:
        return None

    def take(self, count: int) -> list[Row]:
        found = list(itertools.islice(self._rows, count))
        self.row += len(found)
        return found

    def close(self) -> None:
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()


class _Lines(_Open):
    _byte = 0

    def read(self, cursor: Cursor) -> Iterator[Row]:
        self._byte, path = cursor.at or 0, Path(self.part.path)
        for number, line, byte in sources.lines_after(path, self.option, cursor.row, self._byte):
            self.row, self._byte = number, byte
            yield sources.json_row(line, f"{path}, line {number}", self.option)

    def at(self) -> int:
        return self._byte

    def take(self, count: int) -> list[Row]:
        return list(itertools.islice(self._rows, count))


class _Table(_Open):
    def read(self, cursor: Cursor) -> Iterator[Row]:
        part = self.part
        trouble = f"{self.option}: {part.where} cannot be read as {part.kind}"
        rows = tables.rows(Path(part.path), part.kind, cursor.row)
        return sources.numbered(rows, part.where, trouble, cursor.row)


class _CsvRows(_Open):
    def read(self, cursor: Cursor) -> Iterator[Row]:
        with self._explained():
            self._file = tables.Csv(Path(self.part.path), cursor.at or 0)
        return iter(())

    def at(self) -> int:
        return self._file.byte

    def take(self, count: int) -> list[Row]:
        with self._explained():
            rows = self._file.take(count)
        first = self.row + 1
        self.row += len(rows)
        return [(f"{self.part.where}, row {i}", Padded(row)) for i, row in enumerate(rows, first)]

    def close(self) -> None:
        self._file.close()

    def _explained(self) -> Any:
        trouble = f"{self.option}: {self.part.where} cannot be read as csv"
        return sources.explained(f"{trouble} after row {self.row}" if self.row else trouble)


class _Rows(_Open):
    """Rows that are in memory, or memory-mapped."""

    def read(self, cursor: Cursor) -> Iterator[Row]:
        rows = given.find(self.part.path)
        if given.is_dataset(rows):
            rows = rows.select(range(min(cursor.row, len(rows)), len(rows)))
            return sources.dataset_rows(rows, self.part.where, cursor.row)
        if self.part.path.startswith(given.PREFIX):
            found = sources.read(self.part.source)
        else:
            found = sources.file_rows(Path(self.part.path), self.option)
        return itertools.islice(found, cursor.row, None)


class _Hub(_Open):
    """Rows of the hub, which `datasets` fetches as they are read, and whose state it keeps.

    Or of an `IterableDataset` that a program gives.
    """

    def read(self, cursor: Cursor) -> Iterator[Row]:
        mine = given.find(self.part.path)
        if mine is None:
            self._dataset = sources.hub_stream(self.part.source)
        else:
            self._dataset = copy.deepcopy(mine)  # which keeps the state that it was given
        if cursor.at:
            self._dataset.load_state_dict(cursor.at)
        for number, row in enumerate(self._dataset, cursor.row + 1):
            yield f"{self.part.where}, row {number}", Padded(row)

    def at(self) -> Any:
        return self._dataset.state_dict() if self.row else None


_OPEN: dict[str, Callable[[Part, Cursor], _Open]] = {
    "jsonl": _Lines,
    "csv": _CsvRows,
    "parquet": _Table,
    "arrow": _Table,
    "saved": _Table,
    "rows": _Rows,
    "hub": _Hub,
}


# --- Draws ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a draw begins."""

    draw: int = 0
    epoch: int = 0
    window: int = 0  # of the epoch
    taken: int = 0  # examples of the window that earlier draws had
    cursor: Cursor = Cursor()  # where the window begins

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def of(saved: dict[str, Any]) -> Place:
        """The place that `as_json` gave; the first one for {}."""
        if not saved:
            return Place()
        return Place(**saved | {"cursor": Cursor(**saved["cursor"])})


class Stream:
    """Examples of a source by draws of equal size, shuffled within windows.

    `encode` makes examples of some rows; it may leave rows out. `buffer`: rows of a window; with 1
    or less, all come in the order of the source.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[Sequence[Row]], list[Any]],
        *,
        seed: int,
        size: int,
        buffer: int,
    ):
        self._parts, self._encode = parts(source), encode
        self._seed, self._size = seed, size
        self._shuffles, self._rows = buffer > 1, max(buffer, size)
        self._source = source
        self._place = Place()
        self._window: list[Any] | None = None  # examples in their order; None: not read
        self._reader: Reader | None = None  # of the thread while it reads
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "stream")
        self._ahead: concurrent.futures.Future | None = None  # the window after this one
        self._first = next(iter(self._beginning(1)), None)
        if self._first is None:
            raise ValueError(
                f"{source.options[0]}: {source.path} is empty; it needs one row for each example "
                "(in JSONL one JSON object a line)."
            )

    def draw(self, number: int, saved: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The examples of a draw, and the place after it as JSON.

        `saved`: a place, {} for the first. If it is beyond the draw, all is read from the start.
        """
        place = Place.of(saved)
        place = Place() if place.draw > number else place
        if self._window is None or place != self._place:
            self._go_to(place)
        while self._place.draw < number:
            self._take()
        return self._take(), self._place.as_json()

    def beginning(self, count: int) -> list[Any]:
        """The examples of the first rows of the source, to check them; no draw is read."""
        return self._encode(self._beginning(count))

    def _beginning(self, count: int) -> list[Row]:
        reader = self._read_from(Cursor(), range(len(self._parts)))
        found = reader.take(count)
        reader.close()
        return found

    def close(self) -> None:
        """Ends the thread, and what it reads with."""
        self._stop()
        self._thread.shutdown(wait=False)

    def _stop(self) -> None:
        ahead, reader, self._ahead, self._reader = self._ahead, self._reader, None, None
        if ahead is not None and not ahead.cancel():
            if concurrent.futures.wait([ahead], _PATIENCE_S).not_done:
                return  # it waits for the hub, perhaps; what it reads with ends with the process
        if reader is not None:
            reader.close()

    def _take(self) -> list[Any]:
        found: list[Any] = []
        while len(found) < self._size:
            taken = self._place.taken
            some = self._window[taken : taken + self._size - len(found)]
            found += some
            self._place = dataclasses.replace(self._place, taken=taken + len(some))
            if len(found) < self._size:
                self._next_window()
        self._place = dataclasses.replace(self._place, draw=self._place.draw + 1)
        return found

    def _go_to(self, place: Place) -> None:
        self._stop()
        self._reader = self._read_from(place.cursor, self._order(place.epoch))
        self._place = place
        _, window = self._read_window(place.epoch, place.window)
        self._window = window or []
        self._read_ahead()

    def _read_ahead(self) -> None:
        place = self._place
        self._ahead = self._thread.submit(self._read_window, place.epoch, place.window + 1)

    def _next_window(self) -> None:
        """Reads the next window with examples; at the end of the source the next epoch begins."""
        empty = 0
        while True:
            place = self._place
            at, self._window = self._ahead.result()
            if self._window is None:  # there are no more rows
                empty += 1
                self._go_to(Place(place.draw, place.epoch + 1))
            else:
                window = place.window + 1
                self._place = dataclasses.replace(place, window=window, taken=0, cursor=at)
                self._read_ahead()
            if self._window:
                return
            if empty > 1:
                raise ValueError(
                    f"{self._source}: no row is left; each was dropped. Raise the limits of tokens."
                )

    def _read_window(self, epoch: int, window: int) -> tuple[Cursor, list[Any] | None]:
        """Where a window begins, and its examples in their order; None at the end of the source."""
        at, number, examples = self._reader.cursor, 0, []
        while rows := self._reader.take(min(self._rows - number, _AT_ONCE)):
            number += len(rows)
            examples += self._encode(rows)
        if not number:
            return at, None
        if not self._shuffles:
            return at, examples
        rng = streams.stream(self._seed, "windows", (epoch << 32) + window)
        return at, [examples[i] for i in rng.permutation(len(examples))]

    def _read_from(self, cursor: Cursor, order: Sequence[int]) -> Reader:
        return Reader(self._parts, order, cursor)

    def _order(self, epoch: int) -> list[int]:
        """The files in the order of an epoch."""
        number = len(self._parts)
        if not self._shuffles:
            return list(range(number))
        return streams.stream(self._seed, "files", epoch).permutation(number).tolist()

    @property
    def first(self) -> Row:
        """The first row of the source."""
        return self._first

    @property
    def parts(self) -> list[Part]:
        """The files of the source."""
        return self._parts
