"""What has happened to files since their sums were recorded."""

from __future__ import annotations

import hashlib
import json

import pytest
from etils import epath

from grpo_jax.run import checksums


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b/c", "b/d/e", "last"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"this is {name}")
    checksums.write(epath.Path(tmp_path), leave_out=("last",))
    return epath.Path(tmp_path)


def faults(folder, **more):
    return checksums.faults(folder, leave_out=("last",), **more)


def test_the_record_holds_the_size_and_sum_of_each_file(folder):
    record = json.loads((folder / "sha256.json").read_text())
    assert record.keys() == {"a", "b/c", "b/d/e"}
    text = b"this is b/c"
    assert record["b/c"] == {"bytes": 11, "sha256": hashlib.sha256(text).hexdigest()}


def test_untouched_files_have_no_fault(folder):
    assert faults(folder) == []
    (folder / "last").write_text("left out")
    assert faults(folder) == []


def test_each_fault_is_named(folder):
    (folder / "a").write_text("this")
    (folder / "b" / "c").write_text("this is b/C")
    (folder / "b" / "d" / "e").unlink()
    (folder / "b" / "f").write_text("")
    assert faults(folder) == [
        "b/d/e is missing",
        "b/f does not belong there",
        "a is truncated, 4 bytes of 9",
        "b/c has changed: its SHA-256 is another",
    ]


def test_each_process_reads_its_share(folder):
    for name in ("a", "b/c", "b/d/e"):
        (folder / name).write_text("changed, and longer")
    shares = [faults(folder, part=part, parts=2) for part in (0, 1)]
    assert [len(share) for share in shares] == [2, 1]
    assert sorted(shares[0] + shares[1]) == sorted(faults(folder))


@pytest.mark.parametrize(
    "text, fault",
    [
        (None, "is missing"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"a": 3}', "is damaged"),
        ("{}", "a does not belong there"),
    ],
)
def test_a_record_that_is_not_one(folder, text, fault):
    record = folder / "sha256.json"
    record.unlink() if text is None else record.write_text(text)
    assert fault in faults(folder)[0]


def test_a_record_that_is_not_text(folder):
    (folder / "sha256.json").write_bytes(b"\xff\xfe")
    assert faults(folder) == ["sha256.json is damaged"]


def test_what_cannot_be_read_has_no_known_fault(folder):
    """Here a folder in the place of a file, which cannot be opened."""
    (folder / "sha256.json").unlink()
    (folder / "sha256.json").mkdir()
    with pytest.raises(OSError):
        faults(folder)
