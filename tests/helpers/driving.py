"""Runs jobs of `drive.py` in new processes, of one that has imported all and has run nothing."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVERS: dict[str, subprocess.Popen] = {}  # by their environments


def drive(jobs: list[dict], environment: dict[str, str], status: int = 0) -> list[str]:
    """How each job ended, up to one that ends the process with `status`."""
    server = _server(environment)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        paths = environment.get("PYTHONPATH", "")
        asked = {"jobs": jobs, "paths": paths, "folder": os.getcwd(), "output": str(output)}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        ended = server.stdout.readline()
        said = output.read_text() if output.exists() else ""
    assert ended == f"{status}\n", f"status {ended}{said[-6000:]}"
    lines = [line for line in said.splitlines() if line.startswith('{"end"')]
    return [json.loads(line)["end"] for line in lines]


def _server(environment: dict[str, str]) -> subprocess.Popen:
    """A process from which those of this environment are forked; importing takes 3 s of each."""
    known = {n: v for n, v in environment.items() if n not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    key = json.dumps(known, sort_keys=True)
    if key not in _SERVERS:
        _SERVERS[key] = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("drive.py")), "--serve"],
            env=environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_end, _SERVERS[key])
    return _SERVERS[key]


def _end(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()
