"""Stops a run on request: SIGTERM, SIGUSR1, Ctrl-C, or the end of its time.

A separate thread receives the request at once, whatever the run is doing. A run that soon reaches
its next boundary saves there, and raises `Stopped`. A run that does not, because it compiles, waits
for a reward or is in a long rollout, is abandoned: that thread saves the run's last state, and ends
the process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple, NoReturn

from grpo_jax.hosts import processes
from grpo_jax.hosts.processes import Word
from grpo_jax.messages.console import console, say
from grpo_jax.run import claim

STATUS = 75  # "try again", EX_TEMPFAIL of sysexits.h
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_STARTED = time.monotonic()  # start of the program, without a few seconds of imports
_FINISH_S = 2.0  # until a rollout or an evaluation is given up; it can be computed again
PATIENCE_S = 5.0  # until the run is abandoned where it is


class Stopped(Exception):  # noqa: N818  (not an error)
    """The run was asked to stop, and has saved what it needs to continue."""


class Asked(Exception):  # noqa: N818
    """The current work is given up, because the run was asked to stop."""


class _WayOut(NamedTuple):
    save: Callable[[], str]  # saves the state, and returns a message about it
    patience_s: float


class StopSignal:
    """Receives requests to stop, and says how to obey them. A context manager; may be nested.

    Outside it signals act as before. A second Ctrl-C ends the program at once. Outside the main
    thread it receives no signals, since Python allows handlers only there.
    """

    def __init__(self, save_before_s: float = 0.0, *, may_exit: bool = False) -> None:
        """`save_before_s`: the run's time in seconds from the program's start; 0: unlimited.

        `may_exit`: this may end the process, which is a program's own. Otherwise only `Stopped`
        ends the run.
        """
        self.name = ""  # the signal or option that all processes obey
        self.save_before_s = save_before_s
        self._may_exit = may_exit
        self._own, self._handled = "", False  # the request to this process alone
        self._since, self._quit_at = float("inf"), float("inf")  # time.monotonic()
        self._word: Word | None = None
        self._way_out: _WayOut | None = None  # None: wait for the current work
        self._depth = 0
        self._lock, self._word_lock = threading.RLock(), threading.RLock()

    def __enter__(self) -> StopSignal:
        self._depth += 1
        if self._depth > 1:
            return self
        self._hears = threading.current_thread() is threading.main_thread()
        self._ear, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        if self._hears:
            self._before = {n: signal.signal(n, self._note) for n in _SIGNALS}
            self._bell_before = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._hears:
            signal.set_wakeup_fd(self._bell_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        os.close(self._bell)
        self._thread.join()
        os.close(self._ear)

    # --- For the run ---

    def asked(self) -> bool:
        """Whether any process got a signal or is out of time, equal on all; all must call this."""
        if self._time_left_s() <= 0:
            self._own = self._own or f"checkpoint.save_before_s = {self.save_before_s:g}"
        self._tell_all()
        return bool(self._the_word().heard())

    def ask(self, name: str) -> None:
        """Asks the run to stop from within the program; messages call the reason `name`."""
        self._own = self._own or name

    def look(self) -> None:
        """Raises `Asked` if the current work must be given up for a stop; all must call it.

        The work gets a moment to finish first.
        """
        if self.asked() and (processes.count() > 1 or time.monotonic() - self._since > _FINISH_S):
            raise Asked

    @contextlib.contextmanager
    def leaving(
        self, save: Callable[[], str], patience_s: float | None = None
    ) -> Iterator[Callable[[], None]]:
        """While entered, a stop calls `save()`, prints its message, and ends the process.

        It does so `patience_s` after the request, by default `PATIENCE_S`. While `save` works, the
        context cannot be left.

        `save` is called from another thread. It is no longer called once the context is left, or
        once the function that this yields is called: after that, `save` may be out of date. With
        several processes `save` is called only if `patience_s` is 0, since all would have to be at
        the same point.
        """
        patience_s = PATIENCE_S if patience_s is None else patience_s
        with self._lock:
            before, self._way_out = self._way_out, _WayOut(save, patience_s)

        def over() -> None:
            with self._lock:  # waits forever if `save` is at work
                self._way_out = None

        try:
            yield over
        finally:
            with self._lock:
                self._way_out = before

    @contextlib.contextmanager
    def nothing_to_lose(self, patience_s: float = 0.0) -> Iterator[None]:
        """While entered, a stop ends the run after `patience_s`: all results are already saved."""

        def message() -> str:
            return (
                f"Stopped by {self.name}; what the run has computed is saved. The same command "
                "continues it."
            )

        try:
            with self.leaving(message, patience_s):
                yield
        except Asked:
            raise Stopped(message()) from None

    # --- What hears ---

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler, in the main thread; it may run long after the signal."""
        if self._handled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._handled, self._own = True, self._own or signal.Signals(number).name

    def _the_word(self) -> Word:
        with self._word_lock:  # made late: it needs the run's processes
            if self._word is None:
                self._word = Word("stop", self._given)
            return self._word

    def _tell_all(self) -> None:
        if self._own and not self.name:
            self._the_word().give(self._own)

    def _given(self, name: str) -> None:
        self.name, self._since = name, time.monotonic()
        again = " once more" if name == "SIGINT" else ""
        say(f"{name}: stopping, and saving first. Ctrl-C{again} ends it without.", always=True)

    def _time_left_s(self) -> float:
        if not self.save_before_s:
            return float("inf")
        return _STARTED + self.save_before_s - time.monotonic()

    def _listen(self) -> None:
        while True:
            now = time.monotonic()
            limit_s = min(self._time_left_s(), self._quit_at - now)
            if self._own:
                limit_s = 0.1
            ready, _, _ = select.select([self._ear], [], [], min(max(limit_s, 0.0), 3600.0))
            if ready:
                numbers = os.read(self._ear, 64)
                if not numbers:  # the context has ended
                    return
                for number in numbers:
                    self._hear(number)
            if self._time_left_s() <= 0:
                self._own = self._own or f"checkpoint.save_before_s = {self.save_before_s:g}"
            self._tell_all()
            if time.monotonic() >= self._quit_at:
                _end("interrupted", 128 + signal.SIGINT)
            self._leave_if_due()

    def _hear(self, number: int) -> None:
        if number not in _SIGNALS:
            return
        if self._own and self._since < float("inf") and number == signal.SIGINT and self._may_exit:
            self._quit_at = time.monotonic() + _FINISH_S  # if the handler does not end it
        self._own = self._own or signal.Signals(number).name

    def _leave_if_due(self) -> None:
        if not self._may_exit or self._since == float("inf"):
            return
        with self._lock:
            way_out = self._way_out
            if way_out is None or time.monotonic() - self._since < way_out.patience_s:
                return
            if way_out.patience_s and processes.count() > 1:  # all processes call `look`
                return
            self._leave(way_out)

    def _leave(self, way_out: _WayOut) -> None:
        try:
            message, status = way_out.save(), STATUS
        except Exception as error:  # from storage, library or disk
            message, status = f"error: what was computed could not be saved: {error}", 1
        say(message, always=True)
        _end(message, status)


def _end(message: str, status: int) -> NoReturn:
    """Ends the process from a thread that is not the main one."""
    claim.release()
    with contextlib.suppress(OSError, ValueError):
        console.show_cursor(True)
        sys.stdout.flush()
    processes.abort(message, status)
