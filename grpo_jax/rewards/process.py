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
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from grpo_jax.rewards import keeper; "
            f"keeper.main({theirs.fileno()}, {os.getpid()}, {setup.memory_bytes}); "
            f"from grpo_jax.rewards import worker; worker.main({theirs.fileno()})"
        )
        alone = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        output = _output()
        self.process = subprocess.Popen(  # the keeper
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,  # a program's own output stays clean
            stderr=output,
            # An accelerator belongs to the trainer; a worker's JAX, if any, runs on the CPU.
            env=alone | os.environ | {"JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C must not reach it
        )
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
        for limit_s, is_asked in ((_OWN_END_S, not is_dead), (_END_LIMIT_S, True)):
            if is_asked:
                self.ask_to_end()
            try:
                self.process.wait(limit_s)
                break
            except subprocess.TimeoutExpired:
                continue
        try:  # in case the keeper hangs, or there is none
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.pipe.close()
        return self.process.wait()


def _output() -> int:
    """The file descriptor of a worker's output: the trainer's standard error, if it has one."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
