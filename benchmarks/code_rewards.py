"""Times the reward `code` on trivial programs: how many a core runs in a second, and by what.

    python benchmarks/code_rewards.py
    python benchmarks/code_rewards.py --seconds 5 --route plain

Prints programs per second of one process: whole programs with a case each, functions with ten cases
in a process, asserts and a pytest file against a program in another process. Beside them, for the
same program: `python -I -c` started anew, and a fork of a Python process that does nothing, which
bounds what can be reached. CPU seconds of the program itself are shown too. The bar is 200 whole
programs a second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_jax.rewards import programs
from grpo_jax.rewards.sandbox import client
from grpo_jax.rewards.sandbox.client import Limits, Sandbox

PROGRAM = "a, b = map(int, input().split())\nprint(a + b)"
FUNCTION = "def add(a, b):\n    return a + b"
TESTS = "from solution import add\ndef test_add():\n    assert add(1, 2) == 3\n"


def rate(run: Callable[[], object], seconds: float) -> float:
    """Calls per second, after one that warms up."""
    run()
    began, number = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        run()
        number += 1
    return number / (time.perf_counter() - began)


def reward(text: str, tests: object) -> None:
    """One completion, which must be right."""
    assert programs.code(["p"], [f"```python\n{text}\n```"], [tests]) == [1.0]


def fork() -> None:
    """A fork that ends at once."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def start() -> None:
    """The same program by a new interpreter, without a sandbox."""
    done = subprocess.run([sys.executable, "-I", "-c", PROGRAM], input=b"1 2", capture_output=True)
    assert done.stdout == b"3\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--route", choices=client.ROUTES, help="how programs are shut in")
    asked = parser.parse_args()
    if asked.route:
        client.ROUTES = (asked.route,)
    calls = {"fn_name": "add", "inputs": [[i, 2] for i in range(10)]}
    calls["outputs"] = [i + 2 for i in range(10)]
    rows = {
        "whole program": lambda: reward(PROGRAM, [{"stdin": "1 2", "stdout": "3"}]),
        "function, 10 cases": lambda: reward(FUNCTION, calls),
        "assert": lambda: reward(FUNCTION, ["assert add(1, 2) == 3"]),
        "pytest file": lambda: reward(FUNCTION, TESTS),
        "new interpreter": start,
        "fork alone": fork,
    }
    with Sandbox(Limits()) as sandbox:
        ended = [sandbox.script(PROGRAM, "1 2") for _ in range(20)]
    print(f"{sandbox.measures}; CPU {1e3 * min(e.cpu_s for e in ended):.1f} ms in the program")
    for name, run in rows.items():
        print(f"{name:20} {rate(run, asked.seconds):8.0f} a second", flush=True)


if __name__ == "__main__":
    main()
