"""A small process beside each process of a run: it says which process was lost, and ends the rest.

When a process dies, JAX ends the others from C++, with a message that names only a port number.
When a process is merely stopped, JAX ends the others only after its own limit. So each process
starts this program, its witness, which does not import JAX, and sends it heartbeats on its standard
input. The witness of process 0 is the hub. The other witnesses report each loss to it; the first
report is the cause, and the hub sends it to all. Each witness prints it as the error message of its
process, and ends that process.

The port is as open as JAX's own, but a connection that does not show the run's token is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import time

_TICK_S = 0.5
_GRACE_S = 1.0  # time for a process to end by itself, with its own message
_MAX_LINE = 10_000  # bytes


class Source:
    """A peer that sends lines: the watched process itself, or another witness."""

    def __init__(self, file: int | socket.socket):
        self.file = file
        self.process: int | None = None  # None until the connection has shown the token
        self.name = ""
        self.silent_s = 0.0
        self._rest = b""

    def lines(self) -> list[str] | None:
        """The lines received since the last call; None when the connection is closed."""
        try:
            data = os.read(self.file if isinstance(self.file, int) else self.file.fileno(), 65536)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _MAX_LINE:
            return None
        self.silent_s = 0.0
        return [line.decode(errors="replace") for line in lines]

    def send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # closed: the next read notices it
            self.file.sendall(line.encode() + b"\n")


class Witness:
    """Watches one process, and the others through the hub."""

    def __init__(self, process: int, name: str, parent: int, lost_s: float, token: str):
        self._number, self._name, self._parent = process, name, parent
        self._lost_s, self._token = lost_s, token
        self._own = Source(0)
        self._others: list[Source] = []  # in the hub: all others; elsewhere: the hub
        self._server: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ, self._own)
        self._verdict_by = float("inf")  # when to act without the hub's answer
        self._seen = ""

    def listen(self) -> int:
        """Becomes the hub; returns the port."""
        self._server = socket.create_server(("", 0), backlog=1024)
        self._selector.register(self._server, selectors.EVENT_READ)
        return self._server.getsockname()[1]

    def connect(self, host: str, port: int) -> None:
        """Connects to the hub, and shows it the token."""
        try:
            hub = Source(socket.create_connection((host, port), timeout=self._lost_s))
        except OSError as error:
            print(
                f"warning: {self._name} cannot reach the witness of process 0 at {host}:{port} "
                f"({error.strerror}): only JAX will report the loss of other processes.",
                file=sys.stderr,
                flush=True,
            )
            return
        hub.process, hub.name = 0, f"process 0 ({host})"
        hub.send(json.dumps([self._token, self._number, self._name]))
        self._add(hub)

    def _add(self, other: Source) -> None:
        self._others.append(other)
        self._selector.register(other.file, selectors.EVENT_READ, other)

    def run(self) -> None:
        """Watches until the run is over."""
        before = speak_at = time.monotonic()
        while True:
            for key, _ in self._selector.select(_TICK_S):
                if key.data is None:
                    self._add(Source(self._server.accept()[0]))
                else:
                    self._hear(key.data)
            now = time.monotonic()
            # While everything was stopped, as by Ctrl-Z, no process counts as silent.
            passed_s, before = min(now - before, 2 * _TICK_S), now
            for source in (self._own, *self._others):
                source.silent_s += passed_s
                if source.silent_s > self._lost_s and not self._seen:
                    self._silent(source)
            if now >= speak_at:  # not once per line received: two peers would answer each other
                speak_at = now + _TICK_S
                for other in self._others:
                    other.send("alive")
            if now > self._verdict_by:
                self._act(self._number, self._seen)

    def _hear(self, source: Source) -> None:
        lines = source.lines()
        if lines is None:
            self._forget(source)
            if source is self._own:
                self._report(
                    self._number,
                    f"{self._name} died without a word: it was killed, perhaps because memory ran "
                    "out, or it crashed; its log may say more",
                )
            elif source.process is not None:
                self._report(
                    source.process,
                    f"{source.name} and its witness are gone: they were killed, or their host was "
                    "lost",
                )
            return
        for line in lines:
            if source is self._own:
                if line == "bye":
                    self._leave()
            elif source.process is None:
                if not self._meet(source, line):
                    return
            elif line == "bye":
                if source.process == 0:
                    sys.exit()
                self._forget(source)
                return
            elif line.startswith("fault "):
                culprit, text = json.loads(line.removeprefix("fault "))
                if self._server:
                    self._report(culprit, text)
                else:
                    self._act(culprit, text)

    def _meet(self, source: Source, line: str) -> bool:
        """Whether a connection belongs to this run; closes it if not."""
        try:
            token, process, name = json.loads(line)
            known = isinstance(token, str) and secrets.compare_digest(token, self._token)
        except (ValueError, TypeError):
            known = False
        if known:
            source.process, source.name = int(process), str(name)
        else:
            self._forget(source)
        return known

    def _forget(self, source: Source) -> None:
        self._selector.unregister(source.file)
        if source is not self._own:
            self._others.remove(source)
            source.file.close()

    def _silent(self, source: Source) -> None:
        if source.process is None and source is not self._own:
            return  # a stranger
        process, name = self._number, self._name
        if source is not self._own:
            process, name = source.process, source.name
        self._report(
            process,
            f"{name} sent no heartbeat for hosts.heartbeat_timeout_s = {self._lost_s:g} s: it is "
            "stopped, or its host hangs",
        )

    def _report(self, culprit: int, text: str) -> None:
        """Reports a loss to the hub, where the first report is taken as the cause."""
        if self._seen:
            return
        self._seen = text
        if self._server:
            for other in self._others:
                other.send("fault " + json.dumps([culprit, text]))
            self._act(culprit, text)
        elif self._others and culprit != 0:
            self._others[0].send("fault " + json.dumps([culprit, text]))
            self._verdict_by = time.monotonic() + 2 * _GRACE_S
        else:  # the hub itself is lost
            self._act(culprit, text)

    def _act(self, culprit: int, text: str) -> None:
        """Prints why the process ends, and ends it."""
        own = culprit == self._number
        if not own:
            text = f"{self._name} ends, because {text}"
        print(f"error: {text}.", file=sys.stderr, flush=True)
        until = time.monotonic() + (0.0 if own else _GRACE_S)
        while os.getppid() == self._parent and time.monotonic() < until:
            time.sleep(0.02)
        if os.getppid() == self._parent:
            # SIGABRT gives the status of a process that JAX ended. It does not reach a stopped
            # process.
            os.kill(self._parent, signal.SIGKILL if own else signal.SIGABRT)
        sys.exit()

    def _leave(self) -> None:
        for other in self._others:
            other.send("bye")
        sys.exit()


def main() -> None:
    """Reads a JSON object from the first line of standard input; the hub prints its port."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the run
        signal.signal(number, signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    setting = json.loads(line)
    hub = setting.pop("hub")
    witness = Witness(**setting)
    if hub:
        witness.connect(*hub)
    else:
        print(witness.listen(), flush=True)
    witness.run()


if __name__ == "__main__":
    main()
