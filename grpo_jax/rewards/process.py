"""A worker process as the pool sees it: start, pipe, and end with all its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection

from grpo_jax.rewards.worker import Setup

_OWN_END_S = 1.0  # time for a worker that closed its pipe to end by itself
_END_LIMIT_S = 5.0  # time for a worker's keeper to end its descendants


class Worker:
    """One worker process, started through its keeper, and its pipe."""

    def __init__(self, setup: Setup, start_limit_s: float):
        self.pipe, theirs = connection.Pipe()
        self.process = start("grpo_jax.rewards.worker", theirs.fileno(), setup.memory_bytes)
        theirs.close()
        self.is_ready = False
        self.called = time.monotonic()  # time of its newest call
        self.deadline = self.called + start_limit_s
        self.num_answered = 0  # calls
        self.answered: set[int] = set()  # rewards that have answered here
        self.pipe.send(setup)

    def ask_to_end(self) -> None:
        """Asks the process to end; `end` waits for it."""
        self.process.terminate()

    def end(self, *, is_dead: bool = False) -> int:
        """Kills the process and all its descendants; returns the keeper's exit code.

        If it `is_dead` already, it first gets time to end by itself, with its own exit code.
        """
        status = end(self.process, is_dead=is_dead)
        self.pipe.close()
        return status


def start(
    module: str, descriptor: int, memory_bytes: int = 0, **variables: str
) -> subprocess.Popen:
    """Starts `module.main(descriptor)` in a process with a keeper; returns the keeper.

    `memory_bytes`: the limit of that process and all that it starts; 0: none. `variables` are set
    in its environment.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from grpo_jax.rewards import keeper; "
        f"keeper.main({descriptor}, {os.getpid()}, {memory_bytes}); "
        f"import {module} as module; module.main({descriptor})"
    )
    alone = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    output = _output()
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=output,  # a program's own output stays clean
        stderr=output,
        # An accelerator belongs to the trainer; a worker's JAX, if any, runs on the CPU.
        env=alone | os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
        start_new_session=True,  # Ctrl-C must not reach it
    )


def end(process: subprocess.Popen, *, is_dead: bool = False) -> int:
    """Kills a process of `start` and all its descendants; returns the keeper's exit code.

    If it `is_dead` already, it first gets time to end by itself, with its own exit code.
    """
    for limit_s, is_asked in ((_OWN_END_S, not is_dead), (_END_LIMIT_S, True)):
        if is_asked:
            process.terminate()
        try:
            process.wait(limit_s)
            break
        except subprocess.TimeoutExpired:
            continue
    try:  # in case the keeper hangs, or there is none
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    return process.wait()


def _output() -> int:
    """The file descriptor of a worker's output: the trainer's standard error, if it has one."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
