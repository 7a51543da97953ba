"""The benchmarks run: a piece of `benchmarks/gpu.py` with a tiny network, and one that fails."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu


@pytest.mark.slow
def test_a_piece_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))  # a process of one device
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    pieces = [("lunch", []), ("step", ["small", "auto", "off", "both"])]
    found = gpu.run(pieces, tmp_path, tiny=True, minutes=5)
    assert found == json.loads((tmp_path / "gpu.json").read_text())
    assert found["lunch"] == {"failed": "KeyError: 'lunch'"}
    step = found["step small auto off both"]
    assert "failed" not in step and step["memory"]["memory/process_gib"] > 0
    assert 0 < step["spread"]["completion_tokens"] < step["full"]["completion_tokens"]
    for lengths in ("full", "spread"):
        assert {"rollout", "prepare", "update"} == step[lengths]["phases"].keys()
        assert all(0 < row["floor_seconds"] for row in step[lengths]["phases"].values())
    assert {"rollout", "scoring", "update"} <= {row["phase"] for row in step["traces"]}
    text = (tmp_path / "gpu.md").read_text()
    assert "Failed: KeyError: 'lunch'" in text and "| update |" in text
    late = gpu.run(pieces[1:], tmp_path, tiny=True, minutes=0)
    assert late["step small auto off both"] == {"failed": "no time was left for it"}


def test_what_a_piece_had_found_stays_when_its_time_is_over(tmp_path, monkeypatch):
    def run(command, stdout, stderr, timeout, env):
        stdout.write('{"full": 1}\n{"full": 1, "spread": 2}\n')
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    found = gpu.run([("step", ["small", "auto", "off", "both"])], tmp_path, tiny=True, minutes=1)
    assert found["step small auto off both"] == {
        "full": 1, "spread": 2, "failed": "not done after 60 s"
    }  # fmt: skip
    assert '"spread": 2' in (tmp_path / "gpu.md").read_text()


def test_a_late_answer_is_told_from_a_wrong_one():
    """Of environments beside others that fail: calls that hit their limit say nothing of them."""
    from environment_faults import compared, status_of

    from grpo_jax.environments.live import Answer

    said = lambda text, **more: Answer(0, "act", [{"content": text}], **more)  # noqa: E731
    alone = [said("1"), said("2"), Answer(0, "finish", reward=2.0)]
    assert compared([alone[0], 0.7, *alone[1:]], alone) == "same"
    late = [said("1"), said("late", failures=("timeout",)), Answer(0, "finish", reward=1.0)]
    assert compared(late, alone) == compared(alone, late) == "late"
    assert compared([said("2"), *late[1:]], alone) == compared(alone[:2], alone) == "wrong"
    assert compared([said("1"), said("2", outcome="env_died"), alone[2]], alone) == "wrong"
    found = [collections.Counter(ways) for ways in (["same"], ["same", "late"], ["late", "wrong"])]
    assert [status_of(counts) for counts in found] == [0, 2, 1]
    assert status_of(found[0], in_time=False) == 1
