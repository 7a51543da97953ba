"""A worker process as the pool has it: started, told, and ended with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection

from grpo_jax.rewards.worker import Setup

_OWN_END_S = 1.0  # for a worker that closed its pipe to end by itself
_END_LIMIT_S = 5.0  # for a worker's keeper to end what is below it


class Worker:
    """One process and its pipe, below its keeper."""

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
            start_new_session=True,  # Ctrl-C is not for it
        )
        theirs.close()
        self.is_ready = False
        self.called = time.monotonic()  # when its newest call was made
        self.deadline = self.called + start_limit_s
        self.num_answered = 0  # calls
        self.answered: set[int] = set()  # the rewards among them
        self.pipe.send(setup)

    def ask_to_end(self) -> None:
        """Begins what `end` waits for."""
        self.process.terminate()

    def end(self, *, is_dead: bool = False) -> int:
        """Kills the process and all that it started; the exit code that the keeper gives.

        Of one that `is_dead` already, its own.
        """
        for limit_s, is_asked in ((_OWN_END_S, not is_dead), (_END_LIMIT_S, True)):
            if is_asked:
                self.ask_to_end()
            try:
                self.process.wait(limit_s)
                break
            except subprocess.TimeoutExpired:
                continue
        try:  # a keeper that hangs; without one, what the worker started
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.pipe.close()
        return self.process.wait()


def _output() -> int:
    """Where a worker's output goes: to the trainer's standard error, if it has one."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
