"""The process from which environments are forked, as the trainer sees it."""

from __future__ import annotations

import dataclasses
import json
import pickle
import select
import socket
import time

from grpo_jax.environments import wire
from grpo_jax.environments.forking import Setup
from grpo_jax.rewards import keeper, process
from grpo_jax.rewards.sources import Source

_MOST_ENDED = 256  # of the last forks that ended, the status is known
_MODULE = "grpo_jax.environments.forking"


class EnvironmentsError(RuntimeError):
    """Environments' processes that cannot be started, though they could before."""


class Home:
    """Starts the process, which begins to import; `wait_ready` before the first `spawn`.

    It and all that it starts end with `close`, and when the thread that made it ends.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        ours, theirs = socket.socketpair()
        # Sets and dicts of texts have the same order in every run.
        self._process = process.start(_MODULE, theirs.fileno(), PYTHONHASHSEED="0")
        theirs.close()
        self.line = wire.Line(ours)
        self.ended: dict[int, int] = {}  # exit status of forks, by number
        self.is_ready = self.is_dead = False
        self._num_trials = 0
        self.threads = 1  # that the imported modules have started, and no fork has
        self.line.send(pickle.dumps(setup))

    def wait_ready(self, limit_s: float) -> None:
        """Waits until all is imported. Raises ValueError with the fault of the user's module."""
        limit = time.monotonic() + limit_s
        while not self.is_ready:
            left_s = limit - time.monotonic()
            if left_s <= 0:
                self.close()
                raise ValueError(
                    f"environment.classes = {[spec for _, spec in self.setup.classes]}, "
                    f"environment.tools = {list(self.setup.tools)}: the modules were not imported "
                    f"after {limit_s:g} s. Let them end their import."
                )
            writing = [self.line.sock] if self.line.is_waiting else []
            ready, _, _ = select.select([self.line.sock], writing, [], left_s)
            self.line.flush()
            if ready:
                self.hear()
            if self.is_dead:
                raise ValueError(
                    "environment.classes or environment.tools: the process that imports "
                    f"{[s for _, s in self.setup.classes] + list(self.setup.tools)} ended with "
                    f"status {self.close()}. The reason may stand above."
                )

    def hear(self) -> None:
        """Takes what the process has told. Raises ValueError if it could not import."""
        try:
            messages = self.line.receive()
        except (EOFError, OSError):
            self.is_dead = True
            return
        for message in map(json.loads, messages):
            if "ended" in message:
                self.ended[message["ended"]] = message["status"]
                if len(self.ended) > _MOST_ENDED:
                    del self.ended[next(iter(self.ended))]
            elif "ready" in message:
                self.is_ready, self.threads = True, message["ready"]["threads"]
                held = {
                    name: Source(file, is_package, text.encode("latin-1"))
                    for name, (file, is_package, text) in message["ready"]["sources"].items()
                }
                # A process that takes this one's place runs the same code.
                self.setup = dataclasses.replace(self.setup, sources=self.setup.sources | held)
            else:
                self.close()
                raise ValueError(message["fault"])

    def next_trial(self) -> int:
        """The number of a fork that is not `Live`'s: it is negative."""
        self._num_trials += 1
        return -self._num_trials

    def spawn(self, number: int) -> wire.Line:
        """Forks an environment's process of this number; returns the line to it."""
        ours, theirs = socket.socketpair()
        self.line.sock.setblocking(True)  # a descriptor goes with a message that is sent whole
        try:
            data = wire.framed(json.dumps({"spawn": number}).encode())
            self.line.sock.settimeout(5.0)
            socket.send_fds(self.line.sock, [data], [theirs.fileno()])
        except OSError:
            self.is_dead = True
        finally:
            self.line.sock.setblocking(False)
            theirs.close()
        return wire.Line(ours)

    def end(self, number: int) -> None:
        """Kills a fork with all that it started."""
        try:
            self.line.send(json.dumps({"end": number}).encode())
        except OSError:
            self.is_dead = True

    def close(self) -> int:
        """Kills the process and all its forks; returns its exit status."""
        self.is_dead = True
        self.line.close()
        return process.end(self._process)


def why(status: int | None) -> str:
    """How a process ended, in words."""
    if status == keeper.OUT_OF_MEMORY:
        return "it needed more memory than environment.memory_limit_gib"
    if status == keeper.TOO_MANY_PROCESSES:
        return "it started too many processes"
    if status is None:
        return "its process ended"
    if status < 0:
        return f"its process was ended by signal {-status}"
    return f"its process ended with status {status}"
