"""launch/gpu.sh: the environment that it hands to the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def _backend_starts(flags: str) -> bool:
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.devices()"
    return (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
    )


def test_its_flags_are_known_to_this_jaxlib(tmp_path):
    given = _launched(tmp_path)
    assert given["arguments"] == "-m grpo_jax.train --config a b.py"
    assert given["XLA_FLAGS"].count("--xla_gpu") >= 4
    assert _backend_starts(given["XLA_FLAGS"])
    assert not _backend_starts(given["XLA_FLAGS"] + " --xla_gpu_no_such_flag=true")


def test_what_is_set_already_stays(tmp_path):
    name = "xla_gpu_enable_pipelined_all_gather"
    flags = f"--{name}=false --xla_dump_to=x"
    given = _launched(tmp_path, XLA_FLAGS=flags, XLA_PYTHON_CLIENT_MEM_FRACTION=".5")
    assert given["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".5"
    assert given["XLA_FLAGS"].startswith(flags) and given["XLA_FLAGS"].count(name) == 1
    assert "--xla_gpu_enable_pipelined_all_reduce=true" in given["XLA_FLAGS"]
