"""Events of a run, for other programs: the command `logging.on_event`, and JSON lines.

The command gets an event's name in GRPO_JAX_EVENT, the run's folder in GRPO_JAX_WORKDIR, and one
JSON object on its standard input: "event", "text", "workdir", "time" (seconds since the epoch) and
the facts of that event. It runs without a shell, and only for the events in `COMMANDED`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.messages import console

COMMANDED = ("finished", "stopped", "failed", "guard")
_LIMIT_S = 30.0  # for one call


def happened(event: str, text: str, **facts: Any) -> None:
    """Reports an event: prints a line if `logging.console` is "json", and calls the command."""
    console.line({"event": event, "text": text, **facts})
    if event in COMMANDED:
        for command in _listening:
            command.call({"event": event, "text": text, **facts})


@contextlib.contextmanager
def told_to(command: str, workdir: Path) -> Iterator[None]:
    """While entered, `command` is called at each event; "" means no command.

    On leaving it waits for the calls, each of which has a time limit. Raises ValueError if it is no
    command, or if the program does not exist.
    """
    if not command:
        yield
        return
    listener = _Command(words(command), workdir)
    _listening.append(listener)
    try:
        yield
    finally:
        _listening.remove(listener)
        listener.wait()


def wait() -> None:
    """Waits for running calls of the command; call it before the process ends."""
    for command in _listening:
        command.wait()


def words(command: str) -> list[str]:
    """A command's program and arguments; raises ValueError if there is no such program."""
    try:
        found = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"logging.on_event = {command!r} cannot be read: {error}.") from error
    if not found or shutil.which(found[0]) is None:
        raise ValueError(
            f"logging.on_event = {command!r}: there is no program "
            f"{found[0] if found else ''!r} that can be run. It is called without a shell; "
            "sh -c '...' has one."
        )
    return found


class _Command:
    """The command of one run. Each call has its own thread, so a hanging call delays nothing."""

    def __init__(self, argv: list[str], workdir: Path):
        self._argv, self._workdir = argv, str(Path(workdir).absolute())
        self._calls: list[threading.Thread] = []
        self._complained, self._lock = False, threading.Lock()

    def call(self, facts: dict[str, Any]) -> None:
        facts = facts | {"workdir": self._workdir, "time": round(time.time(), 3)}
        given = json.dumps(console.plain(facts))
        thread = threading.Thread(target=self._call, args=(facts["event"], given), daemon=True)
        self._calls.append(thread)
        thread.start()

    def wait(self) -> None:
        for thread in self._calls:
            thread.join(_LIMIT_S + 5.0)
        self._calls = []

    def _call(self, event: str, given: str) -> None:
        variables = {"GRPO_JAX_EVENT": event, "GRPO_JAX_WORKDIR": self._workdir}
        with tempfile.TemporaryFile() as said:  # programs it leaves running would hold a pipe open
            try:
                process = subprocess.Popen(
                    self._argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env=os.environ | variables,
                    start_new_session=True,
                )
            except OSError as error:
                self._complain(event, str(error))
                return
            try:
                process.communicate(given.encode(), timeout=_LIMIT_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all its children
                process.wait()
                self._complain(event, f"it took more than {_LIMIT_S:g} s, and was ended")
                return
            if process.returncode:
                said.seek(0)
                last = said.read(10_000).decode(errors="replace").strip().rpartition("\n")[2]
                self._complain(event, f"status {process.returncode}{': ' * bool(last)}{last}")

    def _complain(self, event: str, why: str) -> None:
        """Prints a warning, once per run."""
        with self._lock:
            if self._complained:
                return
            self._complained = True
        why = console.cut_middle(why, 300)
        console.say(f"warning: logging.on_event failed for {event!r}: {why}. The run goes on.")


_listening: list[_Command] = []
