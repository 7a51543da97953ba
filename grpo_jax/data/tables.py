"""Reads tables from untrusted files: Parquet, Arrow, saved datasets, CSV.

A few bytes of the first three may unpack to any size, which the file's header need not state, and a
damaged file may end the process that reads it. So a separate process with limited memory reads
them, and passes on plain values, a few rows at a time, as an Arrow stream. References to images or
sounds elsewhere are passed on as they are; no such file is opened. CSV is not compressed; it is
read here, with a bound on each row.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.messages.values import shown

# A file may unpack to this many bytes, plus this many times its own size.
MAX_UNPACKED_BYTES = 2**31
MAX_UNPACKED_TIMES = 1000
MAX_ROW_BYTES = 2**26  # of CSV
MAX_COLUMNS = 10_000  # of CSV: an empty column takes a byte in the file, and a thousand here
MEMORY_BYTES = 2**32  # of the process that unpacks
_BATCH_ROWS = 256
_VALUE_BYTES = 32  # least size of a value in memory, whatever its size in the file


class TableError(ValueError):
    """A file could not be read as a table; its text is the reason."""


def rows(path: Path, kind: str, first: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of a file ("parquet", "arrow", "csv") or a folder ("saved", of `save_to_disk`).

    `first`: rows to pass over, without reading what comes before in all kinds but CSV. Raises
    TableError for a file that is not of this kind, or is beyond the limits at the top of this
    module.
    """
    if kind != "csv":
        yield from _from_process(path, kind, first)
        return
    with _told():
        with path.open(encoding="utf-8-sig", newline="") as file:
            for batch in _batches(_Rows(file)):
                yield from values(batch)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns the errors of Arrow and pandas, which have no common base class, into TableErrors."""
    try:
        yield
    except TableError:
        raise
    except Exception as error:
        raise TableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


def _from_process(path: Path, kind: str, first: int) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from grpo_jax.data import tables; tables.main()"
    )
    size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.glob("*.arrow")))
    most_bytes = MAX_UNPACKED_BYTES + MAX_UNPACKED_TIMES * size
    limits = {"all": most_bytes, "memory": MEMORY_BYTES, "first": first}
    process = subprocess.Popen(
        [sys.executable, "-c", code, kind, str(path), json.dumps(limits)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Arrow's other allocators reserve more than they use, which counts toward the limit.
        env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"},
    )
    try:
        try:
            if process.stdout.peek(1):  # a table without rows writes nothing
                with pa.ipc.open_stream(process.stdout) as stream:
                    for batch in stream:
                        yield from values(batch)
        except (pa.ArrowInvalid, OSError):  # the stream was cut off; the process reports why
            if not process.wait():
                raise
        if process.wait():
            raise TableError(_end(process.returncode, process.stderr.read().decode()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def values(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow record batch or table, as Python values."""
    columns = {
        name: _from_json(column.to_pylist(), column.type)
        for name, column in zip(batch.schema.names, batch.columns)
    }
    return (dict(zip(columns, row)) for row in zip(*columns.values()))


def _from_json(column: list, kind: Any) -> list:
    """The values of a column; `datasets` stores some types as JSON texts, which are parsed."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        try:
            return [None if value is None else json.loads(value) for value in column]
        except (ValueError, RecursionError) as error:
            raise TableError(f"a column of JSON holds what is none: {error}") from error
    if pa.types.is_struct(kind):
        for field in kind:
            parts = _from_json([v and v[field.name] for v in column], field.type)
            for value, part in zip(column, parts):
                if value is not None:
                    value[field.name] = part
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [v and _from_json(v, kind.value_type) for v in column]
    return column


def _end(status: int, told: str) -> str:
    """The reason why the process ended early."""
    if status == 1 and told.strip():
        return told.strip().splitlines()[-1]  # the error, after its traceback
    if status == -signal.SIGKILL:
        return "the process that reads it was killed; is the memory full?"
    return f"the process that reads it ended with status {status}"


# --- CSV ------------------------------------------------------------------------------------------


class Csv:
    """A CSV file that is read on from a place: `byte` is where a row begins, 0 at the start."""

    def __init__(self, path: Path, byte: int = 0):
        with path.open("rb") as file:
            self._start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # the mark of UTF-8
        self._file = self._open(path)
        with _told():
            self._header = self._rows.read(1)
        if byte:
            self._file.close()
            self._start = byte
            self._file = self._open(path)

    def _open(self, path: Path) -> Any:
        binary = path.open("rb")
        binary.seek(self._start)
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        self._rows = _Rows(file)
        return file

    @property
    def byte(self) -> int:
        """Where the next row begins."""
        return self._start + self._rows.num_bytes

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next rows, fewer at the end; pandas infers each column's type from these."""
        with _told():
            text = self._rows.take(count)
            batches = _batches(io.StringIO(self._header + "".join(text))) if text else ()
            return [row for batch in batches for row in values(batch)]

    def close(self) -> None:
        self._file.close()


def _batches(file: Any) -> Iterator[Any]:
    """Batches of a CSV file; pandas infers each column's type from its first rows."""
    import pandas
    import pyarrow as pa

    with pandas.read_csv(file, chunksize=10_000) as frames:
        for frame in frames:
            if not isinstance(frame.index, pandas.RangeIndex):
                raise TableError("its rows have more values than its first line has names")
            columns = {}
            for name in frame.columns:
                try:
                    columns[str(name)] = pa.array(frame[name], from_pandas=True)
                except OverflowError:
                    raise _large_number(frame[name]) from None
            yield pa.record_batch(columns)


def _large_number(column: Any) -> TableError:
    """The message for the first number of a column that is too large for Arrow."""
    for number, value in column.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return TableError(
                f"row {number + 1} has {shown(value, 80)} as `{str(column.name)[:80]}`, and whole "
                "numbers of a CSV file have at most 64 bits. Write the file as JSONL, with that "
                "number as a text"
            )
    return TableError(f"`{str(column.name)[:80]}` has a whole number of more than 64 bits")


class _Rows:
    """A CSV file for pandas that gives only whole rows, each of limited length.

    A quoted row may span many lines; `csv` finds its end by the same rules as pandas.
    """

    def __init__(self, file: Any):
        self._file = file
        self._number = 0  # of the line
        self.num_bytes = 0  # read so far, of whole rows once one was taken; with the mark of UTF-8
        self._row_bytes = 0
        self._text: list[str] = []
        self._rows = csv.reader(self._lines())

    def _lines(self) -> Iterator[str]:
        while line := self._line():
            self._number += 1
            size = len(line) if line.isascii() else len(line.encode())
            self._row_bytes += size
            self.num_bytes += size
            if self._row_bytes > MAX_ROW_BYTES:
                raise TableError(
                    f"the row of line {self._number} is longer than {MAX_ROW_BYTES} bytes, the "
                    "most that is read at once"
                )
            if "\0" in line:
                raise TableError(f"line {self._number} holds a NUL byte: is the file packed?")
            self._text.append(line)
            yield line

    def _line(self) -> str:
        try:
            return self._file.readline(MAX_ROW_BYTES + 1)
        except UnicodeDecodeError:
            raise TableError(
                f"it is not UTF-8 from about line {self._number + 1} on: is the file packed?"
            ) from None

    def __iter__(self) -> Iterator[str]:  # pandas checks that it exists
        return iter(lambda: self.read(1), "")

    def read(self, size: int = -1) -> str:
        """The text of whole rows, about `size` characters; "" at the end."""
        self._text.clear()
        length = 0
        while length < max(size, 1) and (read := self._row()):
            length += read[1]
        return "".join(self._text)

    def take(self, count: int) -> list[str]:
        """The texts of the next rows that are not blank, fewer at the end."""
        found: list[str] = []
        while len(found) < count:
            self._text.clear()
            if (read := self._row()) is None:
                break
            if read[0]:
                found.append("".join(self._text))
        if found and not found[-1].endswith(("\n", "\r")):
            found[-1] += "\n"
        return found

    def _row(self) -> tuple[list[str], int] | None:
        """The values of the next row, and its length in bytes; None at the end."""
        before = csv.field_size_limit(MAX_ROW_BYTES)
        try:
            row = next(self._rows, None)
        finally:
            csv.field_size_limit(before)
        if row is None:
            return None
        if len(row) > MAX_COLUMNS:
            raise TableError(f"the row of line {self._number} has more than {MAX_COLUMNS} values")
        length, self._row_bytes = self._row_bytes, 0
        return row, length


# --- The process ----------------------------------------------------------------------------------


def main() -> None:
    """Writes the table named by the arguments to standard output; exits with 1 on an error."""
    kind, path, limits = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    out, told = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(2), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for said in (1, 2):  # discard what libraries print
        os.dup2(nowhere, said)
    reason = ""
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limits["memory"], limits["memory"]))
        _pass_on(_READERS[kind](path, limits["first"]), out, limits["all"])
        out.close()
    except MemoryError:
        most = f"{limits['memory'] / 2**30:g} GiB of memory"
        reason = f"it asked for more than {most}. Write it as .jsonl, one JSON object a line"
    except TableError as error:
        reason = str(error)
    except BrokenPipeError:  # nobody reads on
        pass
    except Exception as error:  # from Arrow and datasets, without a common base class
        reason = _reason(error)
    told.write(reason.encode(errors="replace").decode())
    told.flush()
    os._exit(bool(reason))  # at once: cleaning up may need more memory than there is


def _pass_on(batches: Iterator[Any], out: Any, most_bytes: int) -> None:
    """Writes record batches with the schema of the first, in parts of a few plain rows."""
    import pyarrow as pa

    schema, writer, total = None, None, 0
    for whole in batches:
        whole.validate(full=True)  # Arrow would read at any address in a damaged file
        for start in range(0, whole.num_rows, _BATCH_ROWS):
            batch = whole.slice(start, _BATCH_ROWS)
            if schema is None:
                names = batch.schema.names
                twice = [name for name in names if names.count(name) > 1]
                if twice:
                    raise TableError(f"two of its columns are called {twice[0][:80]!r}")
                schema = pa.schema([pa.field(f.name, _plain(f.type)) for f in batch.schema])
                writer = pa.ipc.new_stream(out, schema)
            if batch.schema.types != schema.types:
                batch = batch.cast(schema)
            total += batch.nbytes + _VALUE_BYTES * sum(map(_num_values, batch.columns))
            if total > most_bytes:
                raise TableError(
                    f"it unpacks to more than {most_bytes} bytes, the most that is read of a file "
                    "of its size. Write it as .jsonl, one JSON object a line"
                )
            writer.write_batch(batch)
    if writer:
        writer.close()


def _plain(kind: Any) -> Any:
    """The type without compression: each row has its own value, without dictionaries or runs.

    Raises TableError for types that Arrow cannot expand.
    """
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.JsonType):
        return _plain(kind.storage_type)
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain(f.type)) for f in kind])
    if types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type), kind.list_size)
    if types.is_nested(kind) or types.is_run_end_encoded(kind):
        raise TableError(f"a column of the type {str(kind)[:80]} is not read")
    return kind


def _num_values(array: Any) -> int:
    """The number of Python values in an array, with those in lists and structs."""
    import pyarrow as pa

    parts = []
    if pa.types.is_struct(array.type):
        parts = array.flatten()
    elif pa.types.is_nested(array.type):  # lists, of one kind or another
        parts = [array.flatten()]
    return len(array) + sum(_num_values(part) for part in parts)


# --- Kinds ----------------------------------------------------------------------------------------


def _parquet(path: str, first: int = 0) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, pre_buffer=False) as file:
        groups = range(file.num_row_groups)
        while first and groups and file.metadata.row_group(groups[0]).num_rows <= first:
            first -= file.metadata.row_group(groups[0]).num_rows
            groups = groups[1:]
        yield from _after(first, file.iter_batches(_BATCH_ROWS, [*groups], use_threads=False))


def _after(first: int, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches without their first rows."""
    for batch in batches:
        if first < batch.num_rows:
            yield batch.slice(first)
        first = max(first - batch.num_rows, 0)


def _arrow(path: str, first: int = 0) -> Iterator[Any]:
    """Batches of an Arrow file, in either of its two formats."""
    import pyarrow as pa

    with pa.memory_map(path) as file:
        try:
            stream = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            file.seek(0)
            whole = pa.ipc.open_file(file)
            stream = (whole.get_batch(i) for i in range(whole.num_record_batches))
        yield from _after(first, stream)


def _saved(path: str, first: int = 0) -> Iterator[Any]:
    """Batches of a folder from `Dataset.save_to_disk`, with the columns of its format."""
    import datasets

    saved = datasets.load_from_disk(path)
    saved = saved.select(range(min(first, len(saved)), len(saved))) if first else saved
    saved.data.table.validate(full=True)
    shown = {name: saved.format[name] for name in ("columns", "output_all_columns")}
    for table in saved.with_format("arrow", **shown).iter(_BATCH_ROWS):
        yield from table.to_batches()


_READERS: dict[str, Callable[..., Iterator[Any]]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "saved": _saved,
}
