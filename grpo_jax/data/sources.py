"""Rows of a data set: from a file, a folder, or the Hugging Face hub.

JSONL and JSON are read here, for two reasons: errors name the broken line, and Arrow's reader,
which `datasets` uses, ends the process at values that nest very deeply. Files of tables are read in
a separate process (`tables.py`), which bounds their unpacked size. They are read again each time,
so a file is never mistaken for an older one of its name and date. `datasets` only assigns a
folder's files to splits, and reads the hub. It is imported only if needed, since that takes
seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.data import given, tables
from grpo_jax.hosts.paths import expanded, near
from grpo_jax.messages.values import cut

Row = tuple[str, dict[str, Any]]  # its place, such as "train.jsonl, line 3"; its columns

# Kinds of files by suffix, with the names of `tables`.
_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_SUFFIXES = (".jsonl", ".json", *_KINDS)

# Limits of what is read into memory at once: a row of text, and a whole JSON file.
MAX_ROW_BYTES = tables.MAX_ROW_BYTES
MAX_JSON_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of rows, and the names of its options for messages."""

    path: str  # a file, a folder or a hub id
    name: str = ""  # a configuration, if a hub dataset or a folder's README.md has some
    split: str = ""  # "": the only one; a file has none
    options: tuple[str, str, str] = ("data.path", "data.name", "data.split")

    def __str__(self) -> str:
        return f"{self.options[0]} = {self.path!r}"


def has_splits(path: str) -> bool:
    """Whether a source can have splits: a file and a saved `Dataset` have none."""
    if path.startswith(given.PREFIX):
        return False
    local = expanded(path, "data.path")
    return not local.is_file() and not (local / "state.json").is_file()


def read(source: Source) -> Iterator[Row]:
    """The rows of a source, in its order.

    Raises ValueError, naming the option and the file, for a source that does not exist or cannot be
    read, an unknown split or configuration, a line of JSONL that is not a JSON object, and a row or
    block beyond the limits at the top of this module. Only files inside the folder or hub dataset
    are read, even if one of its files refers to others.
    """
    if source.path.startswith(given.PREFIX):
        yield from _given_rows(source)
        return
    found = files(source)
    if found is None:
        yield from _hub_rows(source)
        return
    for path in found:
        if path.is_dir():
            yield from _saved_rows(path, source)
        else:
            yield from file_rows(path, source.options[0])


def files(source: Source) -> list[Path] | None:
    """The files of a source, in its order; None for a hub dataset, which has none here.

    What `Dataset.save_to_disk` wrote is one folder. Raises as `read`.
    """
    path = expanded(source.path, source.options[0])
    if path.is_file():
        return [path]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [_saved(path, source)]
    if not path.is_dir():
        return None
    hint = "Give a folder with files such as train.jsonl, or one that save_to_disk wrote."
    splits = _splits(source, f"{source} cannot be read as a folder of data", hint)
    return [Path(file) for file in splits[_chosen(source, list(splits))]]


def _given_rows(source: Source) -> Iterator[Row]:
    """Rows from `given`; the program has already chosen split and configuration."""
    rows, name = given.find(source.path), source.path.removeprefix(given.PREFIX)
    if rows is None:
        raise ValueError(
            f"{source} stands for rows that a Python program gave, and this program gave none. Go "
            "on with that run from the program, or give a file."
        )
    if given.is_dataset(rows):
        yield from dataset_rows(rows, name)
        return
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", dict(row)


# --- Files ----------------------------------------------------------------------------------------


def file_rows(path: Path, option: str) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        yield from _json_lines(path, option)
    elif path.suffix == ".json":
        yield from _json_rows(path, option)
    elif path.suffix not in _KINDS:
        raise ValueError(
            f"{option}: {path} is not a kind of file that is read. Give one whose name ends in "
            f"{', '.join(_SUFFIXES)}."
        )
    elif path.stat().st_size:
        kind = _KINDS[path.suffix]
        trouble = f"{option}: {path} cannot be read as {kind}"
        yield from numbered(tables.rows(path, kind), str(path), trouble)


def _json_lines(path: Path, option: str) -> Iterator[Row]:
    for number, line in lines(path, option):
        yield json_row(line, f"{path}, line {number}", option)


def json_row(line: str, where: str, option: str) -> Row:
    """The row of a line of JSONL; ValueError for what is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{option}: {where} is not JSON ({error}): {cut(line)}. Each line needs one JSON "
            "object."
        ) from error
    return where, _as_row(row, where, option)


def _json_rows(path: Path, option: str) -> Iterator[Row]:
    """Rows of a .json file: a list of objects, one object, or lines as in JSONL."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"{option}: {path} has {size} bytes, and a .json file, which is read as a whole, at "
            f"most {MAX_JSON_BYTES}. Write it as .jsonl, one JSON object a line."
        )
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        value = json.loads(text) if text else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, option)
            return
        raise ValueError(f"{option}: {path} cannot be read as json ({error}).") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{option}: {path} cannot be read as json ({error}).") from error
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{path}, row {number}"
        yield where, _as_row(row, where, option)


def _as_row(row: Any, where: str, option: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(
            f"{option}: {where} is a {type(row).__name__}, not a JSON object: "
            f'{cut(repr(row))}. Write {{"prompt": ..., "answer": ...}}.'
        )
    return row


def lines(path: Path, option: str) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers from 1, read one at a time."""
    for number, text, _ in lines_after(path, option):
        yield number, text


def lines_after(
    path: Path, option: str, number: int = 0, byte: int = 0
) -> Iterator[tuple[int, str, int]]:
    """Non-blank lines after the first `number`, which end at `byte`: number, text, end in bytes."""
    try:
        with path.open("rb") as file:
            file.seek(byte)
            pieces = iter(lambda: file.readline(MAX_ROW_BYTES + 1), b"")
            for line in pieces:
                number, byte = number + 1, byte + len(line)
                if len(line) > MAX_ROW_BYTES:
                    raise _too_large(option, f"{path}, line {number}", MAX_ROW_BYTES)
                try:
                    # A byte-order mark, which some editors write, is not part of the first line.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{option}: {path}, line {number} is not UTF-8. Save the file as UTF-8."
                    ) from error
                if text:
                    yield number, text, byte
    except OSError as error:
        raise ValueError(f"{option}: cannot read {path}: {error.strerror}.") from error


def _too_large(option: str, what: str, most_bytes: int) -> ValueError:
    return ValueError(
        f"{option}: {what} is longer than {most_bytes} bytes, the most that is read at once. "
        "Is it a text file of one row a line? Split the row or the block."
    )


# --- Folders and the hub --------------------------------------------------------------------------


def _saved(path: Path, source: Source) -> Path:
    """The folder that `Dataset.save_to_disk` wrote, of the chosen split of a dictionary."""
    trouble = f"{source} cannot be read as a saved dataset"
    with explained(trouble):
        splits = _saved_splits(path)
    if splits is not None:
        path = path / _chosen(source, splits)
    with explained(trouble):
        _refuse_files_outside(path / "state.json")
    return path


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a saved dataset, in its order; None if it is not all of their rows."""
    state = _small_json(folder / "state.json")
    chosen = ("_indices_data_files", "_indices_files", "_format_columns")
    if any(state.get(name) for name in chosen):
        return None
    return [folder / file["filename"] for file in state["_data_files"]]


def _saved_rows(path: Path, source: Source) -> Iterator[Row]:
    """Rows of what `_saved` found."""
    trouble = f"{source} cannot be read as a saved dataset"
    is_split = path != expanded(source.path, source.options[0])
    where = f"{source.path} ({path.name})" if is_split else source.path
    yield from numbered(tables.rows(path, "saved"), where, trouble)


def _saved_splits(folder: Path) -> list[str] | None:
    """The splits of a saved dictionary of datasets, each a folder in it; None for one dataset."""
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return None
    names = _small_json(file)["splits"]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{file} names the split {str(name)[:80]!r}, which is no folder")
    return list(names)


def _refuse_files_outside(state: Path) -> None:
    """Raises ValueError if a saved dataset names a file outside its folder."""
    for file in _small_json(state)["_data_files"]:
        name = file["filename"]
        beside = isinstance(name, str) and Path(name).name == name
        if not beside or not (state.parent / name).is_file():
            raise ValueError(f"{state} names {str(name)[:80]!r}, which is not a file beside it")


def _small_json(file: Path) -> dict[str, Any]:
    if not file.is_file() or file.stat().st_size > MAX_ROW_BYTES:
        raise ValueError(f"{file} is not a file of at most {MAX_ROW_BYTES} bytes")
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a JSON object")
    return value


def _hub_rows(source: Source) -> Iterator[Row]:
    split, dataset = _from_hub(source)
    yield from dataset_rows(dataset, f"{source.path} ({split})")


def hub_stream(source: Source) -> Any:
    """A hub dataset that is fetched as it is read, a `datasets.IterableDataset`."""
    return _from_hub(source, streaming=True)[1].decode(False)


def _from_hub(source: Source, *, streaming: bool = False) -> tuple[str, Any]:
    """The split of a hub dataset that is chosen, and the dataset."""
    path, file = source.path, Path(source.path)
    missing = f"{source}: there is no such file or folder"
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    is_file = file.suffix in _SUFFIXES
    if not hub_id or is_file or ("/" in path and Path(file.parts[0]).is_dir()):
        seen = "" if file.is_absolute() else f", as seen from {Path.cwd()}"
        raise ValueError(
            f"{missing}{seen}, and it does not look like a hub id (owner/name).{near(file)} "
            "Give a file or folder that exists, or a hub id."
        )
    missing += ", and the Hugging Face hub does not give a dataset of that name"
    hint = "Check the spelling and the connection; a private or gated one needs `hf auth login`."
    splits = _splits(source, missing, hint)
    split = _chosen(source, list(splits), slices=not streaming)
    with explained(f"{source}, {source.options[2]} = {split!r} cannot be read", hint):
        import datasets

        more = {"streaming": True} if streaming else {}
        return split, datasets.load_dataset(path, source.name or None, split=split, **more)


def _splits(source: Source, trouble: str, hint: str = "") -> dict[str, list[str]]:
    """The files of each split; only the splits' names for a cached dataset without a connection."""
    local = expanded(source.path, source.options[0])
    path = str(local) if local.is_dir() else source.path
    if local.is_dir() and set("[*?") & set(str(local.resolve())):
        raise ValueError(
            f"{source} is at {local.resolve()}, and `datasets`, which finds the files of a folder, "
            "reads the characters [ * ? as a pattern. Give one of its files, or rename it."
        )
    try:
        with explained(trouble, hint), _quiet() as datasets:
            builder = datasets.load_dataset_builder(path, source.name or None)
    except ValueError as error:  # perhaps the configuration is unknown or missing
        known = re.search(r"onfig.*\[('.*')\]", str(error.__cause__), re.DOTALL)
        if not known:
            raise
        if known[1] == "'default'" and local.is_dir():  # the folder names none
            return _splits(dataclasses.replace(source, name=""), trouble, hint)
        raise ValueError(
            f"{source.options[1]} = {source.name!r}: {source} has the configurations {known[1]}. "
            f"Set {source.options[1]} to one of them."
        ) from error
    files = builder.config.data_files or {split: [] for split in builder.info.splits or ()}
    splits = {str(split): list(map(str, paths)) for split, paths in files.items()}
    for name in (name for names in splits.values() for name in names):
        # A README.md may name patterns of files anywhere. With a README.md, `datasets` returns
        # paths that begin like ours; without one, paths of the folder behind a link.
        file, folders = Path(os.path.abspath(name)), (os.path.abspath(path), local.resolve())
        inside = any(map(file.is_relative_to, folders))
        if not (inside if local.is_dir() else name.startswith(f"hf://datasets/{path}@")):
            raise ValueError(
                f"{source} names the file {name[:200]}, which does not belong to it. Only files of "
                "the folder or dataset itself are read."
            )
    return splits


def _chosen(source: Source, names: list[str], slices: bool = False) -> str:
    """The selected split; with `slices` also "train[:100]" and "train+test"."""
    split, option = source.split, source.options[2]
    parts = {part.partition("[")[0] for part in split.split("+")} if slices else {split}
    if parts <= set(names):
        return split
    if not split and len(names) == 1:
        return names[0]
    known = f"the splits {', '.join(names)}" if names else "no splits"
    raise ValueError(f"{option} = {split!r}: {source} has {known}. Set {option} to one of them.")


# --- What `tables` and `datasets` give ------------------------------------------------------------


class Padded(dict):
    """A row of Arrow: its structs have the keys of all rows, with null for missing values."""


def numbered(
    rows: Iterator[dict[str, Any]], where: str, trouble: str, number: int = 0
) -> Iterator[Row]:
    """Rows of a table with their places; `number`: of the rows before them."""
    try:
        for row in rows:
            number += 1
            yield f"{where}, row {number}", Padded(row)
    except tables.TableError as error:
        after = f" after row {number}" * bool(number)
        raise ValueError(f"{trouble}{after} ({error}).") from error


def dataset_rows(dataset: Any, where: str, number: int = 0) -> Iterator[Row]:
    """Rows as they are stored; files that an image column names are not opened.

    `number`: of the rows before them.
    """
    batches = dataset.with_format("arrow").iter(batch_size=1000)
    while True:
        with explained(f"{where} cannot be read after row {number}"):
            batch = next(batches, None)
            rows = None if batch is None else list(tables.values(batch))
        if rows is None:
            return
        for row in rows:
            number += 1
            yield f"{where}, row {number}", Padded(row)


@contextlib.contextmanager
def explained(trouble: str, hint: str = "") -> Iterator[None]:
    """Turns any error into a ValueError of one line: the problem, its reason, a hint."""
    try:
        yield
    except Exception as error:  # hub, HTTP library, Arrow, pandas: no common base
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise ValueError(f"{trouble} ({reason}). {hint}".strip()) from error


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Yields the module `datasets`; meanwhile it shows no progress bars and error reports."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
