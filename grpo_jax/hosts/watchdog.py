"""A watchdog: ends a run that makes no progress, and says what it was waiting for."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from grpo_jax.hosts import processes


class Watchdog:
    """Ends the run when a phase makes no progress, and names the phase. A context manager.

    It watches from its own thread, so it notices a run that waits for a device, a disk or another
    process. Time in which that thread was stopped too, as by Ctrl-Z, does not count.
    """

    def __init__(self, limit_s: float, on_stall: Callable[[str], None] | None = None):
        """`limit_s` 0 turns it off. `on_stall(message)` replaces the end of the process."""
        self._limit_s, self._on_stall = limit_s, on_stall or _end
        self._phase, self._since = "the start", time.monotonic()
        self._over = threading.Event()

    def phase(self, what: str) -> None:
        """Names the phase that begins now."""
        self._phase, self._since = what, time.monotonic()

    def alive(self) -> None:
        """Notes that the phase makes progress."""
        self._since = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.alive()
        if self._limit_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        tick_s = min(self._limit_s / 8, 1.0)
        before, silent_s, since = time.monotonic(), 0.0, self._since
        while not self._over.wait(tick_s):
            now = time.monotonic()
            passed_s, before = min(now - before, 2 * tick_s), now
            silent_s = silent_s + passed_s if since == self._since else 0.0
            since = self._since
            if silent_s >= self._limit_s:
                self._on_stall(
                    f"{self._phase}: no progress for loop.stall_timeout_s = {self._limit_s:g} s."
                )
                return


def _end(message: str) -> NoReturn:
    print(f"error: {message} This is where it waits:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    processes.abort(message)
