"""The benchmarks run: a few pieces of `benchmarks/gpu.py` with a tiny network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu


@pytest.mark.slow
def test_pieces_of_the_gpu_benchmark(tmp_path, monkeypatch):
    pieces = [("environment", []), ("step", ["small", "spread"])]
    monkeypatch.setattr(gpu, "PIECES", {"A": pieces})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = gpu.run("A", tmp_path, tiny=True, minutes=5)
    assert found == json.loads((tmp_path / "gpu.json").read_text())
    assert found["environment"]["tflops_of_a_product"] > 0
    step = found["step small spread"]
    assert step["work"]["mean_tokens"] == 3 and step["memory"]["memory/process_gib"] > 0
    assert {"rollout", "prepare", "update"} == step["phases"].keys()
    assert all(0 < row["floor_seconds"] for row in step["phases"].values())


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PIECES", {"A": [("lunch", []), ("environment", [])]})
    found = gpu.run("A", tmp_path, tiny=True, minutes=5)
    assert found["lunch"] == {"failed": "KeyError: 'lunch'"}
    assert "failed" not in found["environment"]
    assert "Failed: KeyError" in (tmp_path / "gpu.md").read_text()
    late = gpu.run("A", tmp_path, tiny=True, minutes=0)
    assert late["environment"] == {"failed": "no time was left for it"}
