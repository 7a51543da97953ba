"""Runs jobs of `drive.py` in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def drive(jobs: list[dict], environment: dict[str, str], status: int = 0) -> list[str]:
    """How each job ended, up to one that ends the process with `status`."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "drive.py"), json.dumps(jobs)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"end"')]
    return [json.loads(line)["end"] for line in lines]
