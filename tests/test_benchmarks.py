"""The benchmarks run: a piece of `benchmarks/gpu.py` with a tiny network, and one that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu


@pytest.mark.slow
def test_a_piece_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PIECES", {"A": [("lunch", []), ("step", ["small", "spread"])]})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # a process of one device
    found = gpu.run("A", tmp_path, tiny=True, minutes=5)
    assert found == json.loads((tmp_path / "gpu.json").read_text())
    assert found["lunch"] == {"failed": "KeyError: 'lunch'"}
    step = found["step small spread"]
    assert step["work"]["mean_tokens"] == 3 and step["memory"]["memory/process_gib"] > 0
    assert {"rollout", "prepare", "update"} == step["phases"].keys()
    assert all(0 < row["floor_seconds"] for row in step["phases"].values())
    text = (tmp_path / "gpu.md").read_text()
    assert "Failed: KeyError: 'lunch'" in text and "| update |" in text
    late = gpu.run("A", tmp_path, tiny=True, minutes=0)
    assert late["step small spread"] == {"failed": "no time was left for it"}
