"""One run, one folder: who holds it, who is refused, and what a dead process leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from grpo_jax.run import claim

HOLD = """
import sys
from pathlib import Path
from grpo_jax.run import claim
claim._BEAT_S = 0.05
claim.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path, until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def _record(folder) -> dict:
    return json.loads((folder / claim.NAME).read_text())


def test_a_second_process_is_refused_with_who_holds_it(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on \S+ since \d{{4}}-"):
        claim.take(tmp_path)
    assert _record(tmp_path)["process"] == holder.pid


def test_what_a_killed_process_left_is_taken_over_and_told(tmp_path, holder, capsys, monkeypatch):
    """At once: the system's lock was let go of, and no heartbeat needs to be waited for."""
    monkeypatch.setattr(claim, "_lives", lambda *given: pytest.fail("it waited for a sign"))
    holder.kill()
    holder.wait()
    with claim.held():
        claim.take(tmp_path)
        told = " ".join(capsys.readouterr().out.split())
        assert f"was held by process {holder.pid} on" in told and "ended without a word" in told
        assert _record(tmp_path)["process"] == os.getpid()
        claim.check()


def test_what_is_let_go_of_is_free(tmp_path, capsys):
    with claim.held():
        claim.take(tmp_path)
        with claim.held():
            claim.take(tmp_path)  # it has it
        assert _record(tmp_path)["process"] == os.getpid()
    assert (tmp_path / claim.NAME).read_text() == ""
    with claim.held():
        claim.take(tmp_path)
    assert not capsys.readouterr().out


@pytest.fixture
def unlocked(monkeypatch):
    """A file system that knows no locks, as some between hosts; and little patience."""

    def flock(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claim.fcntl, "flock", flock)
    monkeypatch.setattr(claim, "_SILENT_S", 2.0)
    monkeypatch.setattr(claim, "_BEAT_S", 0.05)


def test_without_locks_signs_of_life_hold_a_folder(tmp_path, holder, unlocked):
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
        claim.take(tmp_path)


def test_without_locks_a_silent_holder_is_replaced_and_finds_out(tmp_path, unlocked, monkeypatch):
    with claim.held():
        claim.take(tmp_path)
        claim.check()
        other = _record(tmp_path) | {"host": "elsewhere", "process": 7, "token": "another"}
        (tmp_path / claim.NAME).write_text(json.dumps(other))  # as one that came while we hung
        with pytest.raises(ValueError, match="was taken over by process 7 on elsewhere"):
            claim.check()
    assert _record(tmp_path)["process"] == 7  # and what is the other's is not cleared
    monkeypatch.setattr(claim, "_SILENT_S", 0.3)
    with claim.held():
        claim.take(tmp_path)  # it sends no heartbeat
        assert _record(tmp_path)["process"] == os.getpid()
