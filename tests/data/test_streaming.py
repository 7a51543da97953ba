"""Streams of rows: every kind of source, each row once an epoch, and the same after a resume."""

from __future__ import annotations

import csv
import itertools
import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from grpo_jax.data import given, sources, streaming, tables
from grpo_jax.data.sources import Source
from grpo_jax.data.streaming import Cursor, Reader, Stream

NUMBER = 23
ROWS = [{"n": i, "text": f'row {i},\n"ä"' * (1 + i % 3)} for i in range(NUMBER)]


def _jsonl(folder, monkeypatch):
    lines = ["", *(json.dumps(row) for row in ROWS)]
    (folder / "d.jsonl").write_text("\n".join(lines) + "\n\n")
    return str(folder / "d.jsonl")


def _json(folder, monkeypatch):
    (folder / "d.json").write_text(json.dumps(ROWS))
    return str(folder / "d.json")


def _csv(folder, monkeypatch):
    with (folder / "d.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["n", "text"])
        writer.writeheader()
        for row in ROWS:
            writer.writerow(row)
            file.write("\n" * 9 * (row["n"] == 4))  # blank lines are no rows
    return str(folder / "d.csv")


def _parquet(folder, monkeypatch):
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "d.parquet", row_group_size=5)
    return str(folder / "d.parquet")


def _arrow_file(folder, monkeypatch, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return str(folder / "d.arrow")


def _arrow_stream(folder, monkeypatch):
    return _arrow_file(folder, monkeypatch, pa.ipc.new_stream)


def _saved(folder, monkeypatch):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return str(folder / "saved")


def _saved_part(folder, monkeypatch):
    whole = datasets.Dataset.from_list([{"n": -1, "text": "left out"}, *ROWS])
    whole.select([*range(1, NUMBER + 1)][::-1]).select([*range(NUMBER)][::-1]).save_to_disk(
        folder / "saved"
    )
    return str(folder / "saved")


def _folder(folder, monkeypatch):
    for name, some in (("train-0", ROWS[:9]), ("train-1", ROWS[9:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return str(folder)


def _list(folder, monkeypatch):
    return given.give("data", ROWS)


def _dataset(folder, monkeypatch):
    return given.give("data", datasets.Dataset.from_list(ROWS))


def _iterable(folder, monkeypatch):
    return given.give("data", datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3))


def _hub(folder, monkeypatch):
    """As the hub gives it, of a local file."""
    file = _jsonl(folder, monkeypatch)

    def stream(source):
        return datasets.load_dataset("json", data_files=file, split="train", streaming=True)

    monkeypatch.setattr(sources, "files", lambda source: None)
    monkeypatch.setattr(sources, "hub_stream", stream)
    return "owner/name"


IN_PROCESSES = (_parquet, _arrow_file, _arrow_stream, _saved, _saved_part)
KINDS = {
    make.__name__[1:]: make
    for make in (_jsonl, _json, _csv, _folder, _list, _dataset, _iterable, _hub, *IN_PROCESSES)
}


def numbers(rows):
    """What is made of rows; the text tells a broken one."""
    assert all(row == ROWS[row["n"]] for _, row in rows)
    return [row["n"] for _, row in rows]


def stream(path, *, encode=numbers, seed=3, size=4, buffer=6):
    source = Source(path, split="train")
    return Stream(source, encode, seed=seed, size=size, buffer=buffer)


def drawn(made: Stream, count: int, first: int = 0, place=None):
    """So many draws, and the place before each of them and after the last."""
    draws, places = [], [place or {}]
    for number in range(first, first + count):
        some, after = made.draw(number, places[-1])
        draws.append(some)
        places.append(json.loads(json.dumps(after)))
    made.close()
    return draws, places


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_goes_on_anywhere_gives_what_one_gives(kind, tmp_path, monkeypatch):
    path = KINDS[kind](tmp_path, monkeypatch)
    count = 2 * NUMBER // 4 + 2  # into the third epoch
    draws, places = drawn(stream(path), count)
    flat = list(itertools.chain(*draws))
    assert {len(some) for some in draws} == {4}
    first, second = flat[:NUMBER], flat[NUMBER : 2 * NUMBER]
    assert sorted(first) == sorted(second) == list(range(NUMBER))  # each row once an epoch
    assert first != second and first != sorted(first)
    for at in (8,) if KINDS[kind] in IN_PROCESSES else (1, 4, 5, 8, 11):
        again, ends = drawn(stream(path), count - at, at, places[at])
        assert again == draws[at:]
        assert kind == "iterable" or ends == places[at:]  # one state may be written in two ways


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_source(kind, tmp_path, monkeypatch):
    path = KINDS[kind](tmp_path, monkeypatch)
    flat = itertools.chain(*drawn(stream(path, buffer=0, size=5), 6)[0])
    assert list(flat) == [*range(NUMBER), *range(NUMBER)][:30]


def test_a_place_only_saves_reading(tmp_path, monkeypatch):
    """Without one, or with one before or after the draw, it is found from the start."""
    path = _jsonl(tmp_path, monkeypatch)
    draws, places = drawn(stream(path), 9)
    for place in ({}, places[2], places[7], places[8]):
        assert stream(path).draw(7, place)[0] == draws[7]
    made = stream(path)
    assert made.draw(2, {})[0] == draws[2]
    assert made.draw(8, places[3])[0] == draws[8]  # as after a roll-back, whose draws are skipped
    assert stream(path, seed=4).draw(0, {})[0] != draws[0]


def test_what_comes_before_a_place_is_not_read(tmp_path, monkeypatch):
    """Of text by its byte, of tables by the groups of their rows."""
    path = _jsonl(tmp_path, monkeypatch)
    _, places = drawn(stream(path, buffer=4), 4)
    text = (tmp_path / "d.jsonl").read_bytes()
    at = places[4]["cursor"]["at"]
    assert at > 0 and text[at:].lstrip().startswith(b'{"n": 12')
    (tmp_path / "d.jsonl").write_bytes(b"\n" * at + text[at:])
    source = Source(path)
    reader = Reader(streaming.parts(source), [0], Cursor(**places[4]["cursor"]))
    assert numbers(reader.take(2)) == [12, 13]
    read = []
    whole = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches",
                        lambda self, size, groups, **more: read.append(groups) or whole(
                            self, size, groups, **more))  # fmt: skip
    [*found] = tables._parquet(_parquet(tmp_path, monkeypatch), 12)
    assert found[0].column("n")[0].as_py() == 12 and read == [[2, 3, 4]]


def test_rows_that_are_left_out(tmp_path, monkeypatch):
    path = _jsonl(tmp_path, monkeypatch)
    odd = lambda rows: [n for n in numbers(rows) if n % 2]  # noqa: E731
    draws, places = drawn(stream(path, encode=odd), 6)
    flat = list(itertools.chain(*draws))
    assert sorted(flat[:11]) == list(range(1, NUMBER, 2)) == sorted(flat[11:22])
    assert drawn(stream(path, encode=odd), 3, 3, places[3])[0] == draws[3:]
    with pytest.raises(ValueError, match="no row is left; each was dropped"):
        stream(path, encode=lambda rows: []).draw(0, {})


def test_files_come_in_another_order_in_each_epoch(tmp_path):
    for i in range(6):
        (tmp_path / f"train-{i}.jsonl").write_text(json.dumps({"n": i}) + "\n")
    of = lambda rows: [row["n"] for _, row in rows]  # noqa: E731
    draws, _ = drawn(stream(str(tmp_path), encode=of, size=6, buffer=2), 3)
    assert all(sorted(some) == list(range(6)) for some in draws)
    assert len({tuple(some) for some in draws}) == 3


def test_bad_rows_are_named_after_a_resume_too(tmp_path, monkeypatch):
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([*map(json.dumps, ROWS[:10]), "no JSON"]))
    _, places = drawn(stream(str(file), buffer=4), 2)
    with pytest.raises(ValueError, match=r"data\.path: .*d\.jsonl, line 11 is not JSON"):
        stream(str(file), buffer=4).draw(2, places[2])
    (tmp_path / "e.csv").write_text("n,text\n" + "1,a\n" * 9 + "1,a,2\n")
    with pytest.raises(ValueError, match=r"data\.path: .*e\.csv cannot be read as csv"):
        stream(str(tmp_path / "e.csv"), encode=len, buffer=20)._go_to(streaming.Place())
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"f\.jsonl is empty"):
        stream(str(tmp_path / "f.jsonl"))
