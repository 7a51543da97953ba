"""launch/gpu.sh: the environment that it hands to the program."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from grpo_jax.planning import topologies

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "gpu.sh"


def _launched(tmp_path, **environment: str) -> dict[str, str]:
    """What a program in Python's place is given: its arguments, and variables by name."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "arguments=$*"\nenv\n')
    stand_in.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path} | environment
    command = [SCRIPT, "--config", "a b.py"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    return dict(line.partition("=")[::2] for line in out.splitlines())


def test_jax_is_given_the_memory_that_plans_count_on(tmp_path):
    given = _launched(tmp_path)
    assert given["arguments"] == "-m grpo_jax.train --config a b.py"
    share = float(given["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    assert all(chip.usable == share * chip.memory for chip in topologies.GPUS.values())
    assert "XLA_FLAGS" not in given


def test_what_is_set_already_stays(tmp_path):
    given = _launched(tmp_path, XLA_FLAGS="--a=b", XLA_PYTHON_CLIENT_MEM_FRACTION=".5")
    assert given["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".5" and given["XLA_FLAGS"] == "--a=b"
