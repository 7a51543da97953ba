"""Files of tables, read in a process of their own: what they unpack to is bounded."""

import bz2
import csv
import gzip
import io
import json
import lzma
import signal
import struct
import tarfile
import zipfile
from pathlib import Path

import audit
import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from grpo_jax.data import tables


def rows(path, kind=None) -> list[dict]:
    return list(tables.rows(path, kind or path.suffix[1:]))


def reason(path, kind=None) -> str:
    with pytest.raises(tables.TableError) as error:
        rows(path, kind)
    return str(error.value)


def passed_on(array: pa.Array, most_bytes: int) -> list:
    """The values of a column as the process passes them on."""
    out = io.BytesIO()
    tables._pass_on(iter([pa.record_batch({"x": array})]), out, most_bytes)
    batches = pa.ipc.open_stream(out.getvalue())
    return [row["x"] for batch in batches for row in tables.values(batch)]


# --- What few bytes unpack to ---------------------------------------------------------------------

LONG = "x" * 10_000
TWICE = pa.DictionaryArray.from_arrays(pa.array([0] * 999, pa.int8()), pa.array([LONG]))
VIEWS = [
    None,
    pa.py_buffer(struct.pack("<i4sii", 10_000, b"xxxx", 0, 0) * 999),
    pa.py_buffer(LONG.encode()),
]
REPEATED = {  # 10 kB that stand for 10 MB, in each way in which Arrow can say so
    "dictionary": TWICE,
    "dictionary in lists": pa.ListArray.from_arrays(pa.array(range(1000), pa.int32()), TWICE),
    "dictionary in structs": pa.StructArray.from_arrays([TWICE], ["a"]),
    "views": pa.Array.from_buffers(pa.string_view(), 999, VIEWS),
    "views of bytes": pa.Array.from_buffers(pa.binary_view(), 999, VIEWS),
    "dictionary in lists of one length": pa.FixedSizeListArray.from_arrays(TWICE, 3),
}


@pytest.mark.parametrize("array", REPEATED.values(), ids=[k.replace(" ", "-") for k in REPEATED])
def test_what_a_file_unpacks_to_is_counted(array):
    assert passed_on(array, 12 * 10**6) == array.to_pylist()
    with pytest.raises(tables.TableError, match="unpacks to more than 9000000 bytes"):
        passed_on(array, 9 * 10**6)


SHARED = {  # values that stand for many, and that Arrow cannot write out, or does wrongly
    "maps": pa.MapArray.from_arrays(pa.array(range(1000), pa.int32()), TWICE, TWICE),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([999], pa.int32()), pa.array([LONG])),
    "views of lists": pa.ListViewArray.from_arrays(
        pa.array([0] * 999, pa.int32()), pa.array([1] * 999, pa.int32()), pa.array([LONG])
    ),
    "unions": pa.UnionArray.from_dense(
        pa.array([0] * 999, pa.int8()), pa.array([0] * 999, pa.int32()), [pa.array([LONG])]
    ),
}


@pytest.mark.parametrize("array", SHARED.values(), ids=[k.replace(" ", "-") for k in SHARED])
def test_what_cannot_be_counted_is_refused(array):
    with pytest.raises(tables.TableError, match=r"a column of the type .* is not read"):
        passed_on(array, 12 * 10**6)


EMPTY = {  # few bytes, or none, of which many values of Python become
    "nulls": pa.nulls(10**6),
    "lists of nulls": pa.ListArray.from_arrays(pa.array([0, 10**6], pa.int32()), pa.nulls(10**6)),
    "lists of one length": pa.FixedSizeListArray.from_arrays(pa.nulls(10**6), 10**6),
    "bits": pa.ListArray.from_arrays(
        pa.array([0, 10**6], pa.int32()), pa.array([False]).take(pa.array([0] * 10**6))
    ),
}


@pytest.mark.parametrize("array", EMPTY.values(), ids=[k.replace(" ", "-") for k in EMPTY])
def test_values_of_few_bytes_are_counted(array):
    with pytest.raises(tables.TableError, match="unpacks to more than 9000000 bytes"):
        passed_on(array, 9 * 10**6)


def repeating(path: Path, num_bytes: int) -> Path:
    """A text of so many bytes twenty times, in a file of a few kB."""
    text = pa.DictionaryArray.from_arrays(
        pa.array([0] * 20, pa.int32()), pa.array(["a" * num_bytes])
    )
    parquet.write_table(
        pa.table({"prompt": text}),
        path,
        compression="zstd",
        dictionary_pagesize_limit=2**30,
        store_schema=False,
    )
    assert path.stat().st_size < 10_000
    return path


def test_a_repeating_parquet_file_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MEMORY_BYTES", 2**29)
    message = reason(repeating(tmp_path / "p.parquet", 2**26))
    assert "it asked for more than 0.5 GiB of memory. Write it as .jsonl" in message


def test_a_file_may_unpack_to_so_many_times_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_UNPACKED_BYTES", 0)
    path = repeating(tmp_path / "p.parquet", 2**20)
    assert f"unpacks to more than {1000 * path.stat().st_size} bytes" in reason(path)


PACKED = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zip": lambda content: _archive(zipfile.ZipFile, content),
    "tar": lambda content: _archive(tarfile.TarFile, content),
}


def _archive(kind: type, content: bytes) -> bytes:
    file = io.BytesIO()
    with kind(file, "w") if kind is zipfile.ZipFile else kind(fileobj=file, mode="w") as archive:
        if kind is zipfile.ZipFile:
            archive.writestr("p.csv", content)
        else:
            info = tarfile.TarInfo("p.csv")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
def test_packed_text_is_refused_whatever_its_name(tmp_path, pack):
    path = tmp_path / "p.csv"
    path.write_bytes(pack(b"prompt,answer\n" + b"hello,1\n" * 1000))
    assert reason(path).endswith("is the file packed?")


# --- CSV ------------------------------------------------------------------------------------------


def read_csv(tmp_path, text: str | bytes) -> list[dict]:
    path = tmp_path / "p.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return rows(path)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('a,"' + ("x" * 99 + "\n") * 100 + '"', 11),  # a value of many lines
        ("a," + '"\n",' * 500 + "1", 252),  # many values of two
        ('a"b,"' + ("x" * 99 + "\n") * 100 + '"', 11),  # a quote within a value opens nothing
        ("a," + "x" * 2000, 2),
        ("a," + "ä" * 600, 2),  # 1,202 bytes
    ],
)
def test_a_row_without_end_is_refused(tmp_path, monkeypatch, rows, line):
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    before = csv.field_size_limit()
    with pytest.raises(tables.TableError, match=f"row of line {line} is longer than 1000 bytes"):
        read_csv(tmp_path, f"prompt,answer\n{rows}\n")
    assert csv.field_size_limit() == before


def test_more_columns_than_rows_could_fill_are_refused(tmp_path):
    assert len(read_csv(tmp_path, ",".join(["a"] * 100) + "\n1\n")[0]) == 100
    with pytest.raises(tables.TableError, match="the row of line 1 has more than 10000 values"):
        read_csv(tmp_path, "," * 10_000 + "\n1\n")


def test_rows_of_csv(tmp_path, monkeypatch):
    """Quotes, line ends, blank lines and a byte-order mark, as pandas reads them."""
    text = '\ufeffprompt,answer\r\n"a\n""b"", c",1\r\n\r\n5" pipe,2\r"x"y,3\n' + "d,4\n" * 500
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 30)  # no row has more
    found = read_csv(tmp_path, text)
    assert [row["prompt"] for row in found[:4]] == ['a\n"b", c', '5" pipe', "xy", "d"]
    assert [row["answer"] for row in found] == [1, 2, 3, *[4] * 500]
    assert read_csv(tmp_path, "prompt,answer\n") == []


def test_types_of_csv(tmp_path):
    text = f"i,f,b,s,gap,none,big\n1,0.5,True,x,1,,{2**63}\n2,1e3,False,7,,,{2**62}\n"
    first, second = read_csv(tmp_path, text)
    assert first == {"i": 1, "f": 0.5, "b": True, "s": "x", "gap": 1.0, "none": None, "big": 2**63}
    assert second == {
        "i": 2,
        "f": 1000.0,
        "b": False,
        "s": "7",
        "gap": None,
        "none": None,
        "big": 2**62,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"prompt\n\xff\n", "it is not UTF-8 from about line 1 on"),
        ("prompt\na\0b\n", "line 2 holds a NUL byte"),
        (f'prompt,answer\n"a,\nb",{2**62}\na,{2**70}\n', f"row 2 has {2**70} as `answer`, and"),
        ("prompt,answer\na,1,2\n", "rows have more values than its first line has names"),
    ],
)
def test_what_is_wrong_with_csv_is_said(tmp_path, text, words):
    with pytest.raises(tables.TableError, match=words):
        read_csv(tmp_path, text)


# --- What stands in columns -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_what_a_picture_names_is_not_opened(tmp_path, kind):
    """`datasets` would open it, here or at an address of the network, and decode what it finds."""
    row = {"prompt": "hi", "picture": {"bytes": None, "path": "/etc/hostname"}}
    features = {"prompt": {"dtype": "string", "_type": "Value"}, "picture": {"_type": "Image"}}
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"prompt": pa.string(), "picture": picture}, metadata=said)
    table, path = pa.Table.from_pylist([row], schema), tmp_path / f"p.{kind}"
    if kind == "saved":
        datasets.Dataset.from_list([row]).save_to_disk(path)
        info = json.loads((path / "dataset_info.json").read_text())
        (path / "dataset_info.json").write_text(json.dumps(info | {"features": features}))
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        file = path / "data-00000-of-00001.arrow" if kind == "saved" else path
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, schema) as writer:
            writer.write_table(table)
    assert rows(path) == [row]


def test_values_of_json_are_read(tmp_path):
    """`datasets` keeps what has no common type as texts of JSON."""
    values = [[{"a": 1}, "b"], None, [], [[2.5]]]
    features = datasets.Features(x=datasets.List(datasets.Json()), y=datasets.Json())
    made = datasets.Dataset.from_dict({"x": values, "y": values}, features=features)
    made.to_parquet(tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == [{"x": value, "y": value} for value in values]


@pytest.mark.parametrize("text", ["{", "[" * 10**5])
def test_what_is_no_json_in_a_column_of_json_is_refused(text):
    batch = pa.record_batch({"x": pa.array([text], pa.json_())})
    with pytest.raises(tables.TableError, match="a column of JSON holds what is none"):
        list(tables.values(batch))


def test_two_columns_of_a_name_are_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "p.parquet")
    assert reason(tmp_path / "p.parquet") == "two of its columns are called 'prompt'"


# --- The process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_it_writes_nothing(tmp_path, kind):
    made = datasets.Dataset.from_dict({"prompt": ["a"]})
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "p.parquet")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    path = {"parquet": tmp_path / "p.parquet", "arrow": arrow, "saved": tmp_path / "saved"}[kind]
    with audit.writes() as written:
        [batch] = tables._READERS[kind](str(path))
    assert batch.to_pylist() == [{"prompt": "a"}] and not audit.outside(written)


def test_what_ended_the_process_is_said():
    assert tables._end(1, "noise\nthe reason\n") == "the reason"
    assert tables._end(-signal.SIGSEGV, "") == "the process that reads it ended with status -11"
    assert "is the memory full?" in tables._end(-signal.SIGKILL, "")


def test_it_ends_when_nobody_reads_on(tmp_path, monkeypatch):
    started = []
    popen = tables.subprocess.Popen
    monkeypatch.setattr(
        tables.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0]
    )
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": ["x"] * 10**6}), path)
    some = tables.rows(path, "parquet")
    assert next(some) == {"prompt": "x"} and started[0].poll() is None
    some.close()
    assert started[0].returncode == -signal.SIGKILL
