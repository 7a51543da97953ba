"""What is said of a full disk."""

from __future__ import annotations

import threading
import time

import pytest
from etils import epath

from grpo_jax.run import disk


def test_a_full_disk_is_known_by_its_number_and_by_its_words():
    with open("/dev/full", "wb", buffering=0) as file:
        with pytest.raises(OSError) as info:
            file.write(b"x")
    assert disk.is_full(info.value)
    assert disk.is_full(OSError(info.value.errno, "in another language"))
    assert disk.is_full(ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device"))
    assert not disk.is_full(ValueError("RESOURCE_EXHAUSTED: out of memory"))
    assert not disk.is_full(FileNotFoundError(2, "No such file"))


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (257_800, "258 kB"),
        (3_141_592_653, "3.14 GB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes_in_words(num_bytes, words):
    assert disk.size(num_bytes) == words


def test_what_is_free(small_disk, tmp_path):
    assert disk.free(small_disk) == "1.05 MB"
    (small_disk / "ballast").write_bytes(bytes(1 << 19))
    assert disk.free(small_disk) == "524 kB"
    assert disk.free(tmp_path / "absent") == ""


def test_a_folder_is_deleted_that_others_still_write_to(tmp_path):
    """A failed save is told before the writes beside the one that failed have ended."""
    folder, until = tmp_path / "partial", time.monotonic() + 0.3
    (folder / "d").mkdir(parents=True)

    def write():
        while time.monotonic() < until:
            for i in range(50):
                try:
                    (folder / "d").mkdir(parents=True, exist_ok=True)
                    (folder / "d" / str(i)).write_bytes(b"x")
                except FileNotFoundError:  # it was deleted in between
                    pass

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    gone = False
    while any(thread.is_alive() for thread in threads) or not gone:
        gone = disk.delete(epath.Path(folder))
    assert not folder.exists()
    assert disk.delete(epath.Path(folder))  # none is there


def test_what_cannot_be_deleted_is_told(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    monkeypatch.setattr(type(folder), "rmtree", lambda self, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # no error of the disk: a fault of ours
        disk.delete(folder)

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "rmtree", refuse)
    assert not disk.delete(folder, patience=0.1)
