"""Logs on a disk that fills up and is freed."""

from __future__ import annotations

import json
import math
import struct

import pytest

from grpo_jax.metrics.tensorboard import EventLog
from grpo_jax.metrics.trackers import Asked
from grpo_jax.metrics.writers import Writers
from grpo_jax.run.append_log import Log, read_jsonl
from grpo_jax.run.whole_files import write_whole


def _fill(folder) -> None:
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass


def test_what_did_not_fit_is_written_when_there_is_space(small_disk):
    said, rows = [], [{"step": step, "text": "x" * 3000} for step in range(9)]
    log = Log(small_disk / "log.jsonl", said.append)
    log.line(rows[0])
    _fill(small_disk)
    for row in rows[1:6]:  # of the first a part still fits
        log.line(row)
    assert len(said) == 1 and "log.jsonl cannot be written, the disk is full" in said[0]
    assert list(read_jsonl(small_disk / "log.jsonl")) != rows[:6]
    (small_disk / "ballast").unlink()
    log.line(rows[6])
    assert (small_disk / "log.jsonl").read_text().splitlines() == [json.dumps(r) for r in rows[:7]]
    _fill(small_disk)
    for row in rows[7:]:
        log.line(row)
    assert len(said) == 2  # told again: it is another time
    (small_disk / "ballast").unlink()
    log.close()
    assert list(read_jsonl(small_disk / "log.jsonl")) == rows and len(said) == 2


def test_what_is_lost_at_the_end_is_told(small_disk):
    said = []
    log = Log(small_disk / "log", said.append)
    _fill(small_disk)
    log.append(b"x" * 9000)
    log.close()
    assert said[1].startswith("warning: the last 9 kB of") and "are lost" in said[1]


def test_tensorboard_waits_for_space(small_disk):
    said = []
    board = EventLog(small_disk / "tensorboard", 0, said.append)
    _fill(small_disk)
    for step in range(200):  # more than any queue holds
        board.text("samples", "text " * 20, step)
    (small_disk / "ballast").unlink()
    board.scalar("reward", 0.5, 200)
    board.close()
    (file,) = (small_disk / "tensorboard").iterdir()
    assert len(said) == 1 and file.read_bytes().count(b"text_summary") == 200


def test_tensorboard_has_the_names_that_the_log_has(tmp_path, capfd):
    """And numbers that are none, without a word."""
    from tensorboardX.proto import event_pb2

    board = EventLog(tmp_path, 0, print)
    for name, value in (("eval/pass@8", 0.5), ("policy/loss", math.nan)):
        board.scalar(name, value, 3)
    board.close()
    (file,) = tmp_path.iterdir()
    content, events = file.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    scalars = [(v.tag, v.simple_value, e.step) for e in events for v in e.summary.value]
    assert scalars[0] == ("eval/pass@8", 0.5, 3)
    assert scalars[1][0] == "policy/loss" and math.isnan(scalars[1][1])
    assert capfd.readouterr() == ("", "")


def test_a_run_s_writers_go_on_with_a_full_disk(small_disk, capsys):
    written = Writers(small_disk, first_step=0, tensorboard=True, trackers=Asked(), config={})
    _fill(small_disk)
    sample = {"prompt": "p", "completion": "c" * 999, "rewards": {}, "advantage": 0.0, "length": 1}
    for step in range(30):
        written.scalars(step, {"reward": 0.5})
        written.samples(step, [sample])
    (small_disk / "ballast").unlink()
    written.close()
    assert capsys.readouterr().out.count("the disk is full") == 3
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [row["step"] for row in read_jsonl(small_disk / name)] == list(range(30))


def test_another_fault_of_the_disk_is_raised(tmp_path):
    log = Log(tmp_path / "log", print)
    log._file.close()
    log._file = open("/proc/self/mem", "rb", buffering=0)
    with pytest.raises(OSError):
        log.append(b"x")


def test_a_file_written_whole_is_the_old_one_on_a_full_disk(small_disk):
    file = small_disk / "facts.json"
    write_whole(file, "old")
    _fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new" * 10_000)
    assert file.read_text() == "old"
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "facts.json"]
