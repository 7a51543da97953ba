"""Runs programs in sandboxes: the side that is trusted, in a reward worker or another process.

A `Sandbox` starts the process of `server.py`, passes it files, and watches what the program does:
time, memory, processes, disk and output. It holds the expected results; the program never does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from grpo_jax.rewards import keeper
from grpo_jax.rewards.sandbox import folder, linux
from grpo_jax.rewards.sandbox.server import STOP, Order, Place

ROUTES = ("root", "user", "plain")
"""Tried in this order: namespaces as root allows them, in a user namespace, or none of them."""

_LOOK_EVERY_S = 0.05  # at memory, processes and disk
_START_LIMIT_S = 60.0
_USUAL = (
    *("array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum"),
    *("fractions", "functools", "heapq", "io", "itertools", "json", "math", "operator", "queue"),
    *("random", "re", "statistics", "string", "struct", "textwrap", "threading", "time", "typing"),
)
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_NUMBERS = itertools.count()  # of this process's sandboxes
_ZONES = ("/usr/share/zoneinfo", "/etc/localtime")


class SandboxError(RuntimeError):
    """The sandbox itself failed, not the program in it."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one program."""

    seconds: float = 4.0  # by the clock, for one case
    memory_bytes: int = 1 << 30
    processes: int = 16  # with threads
    disk_bytes: int = 64 << 20  # of all files, in memory where there are namespaces
    output_bytes: int = 16 << 20


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended, and what it said."""

    status: int  # exit status, as in `subprocess`
    stopped: str  # "time", "memory", "processes", "disk" or "output", if a limit stopped it
    output: bytes
    error: str  # as the program's process told it: not to be trusted
    seconds: float
    cpu_s: float


class Sandbox:
    """One process that starts programs, one after the other. A context manager."""

    def __init__(self, limits: Limits = Limits(), preload: tuple[str, ...] = ()):
        self.limits = limits
        self.preload = (*_USUAL, *preload)
        self.measures: dict[str, Any] = {}
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._heard = b""
        self._folder = ""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process by the first route that is open. SandboxError if none is."""
        if self._process is not None:
            return
        faults = {}
        for route in ROUTES:
            if (route == "root" and os.geteuid()) or (route != "plain" and not linux.is_here()):
                continue
            fault = self._started(route)
            if not fault:
                self.measures |= {"route": route, "faults": faults}
                return
            faults[route] = fault
            self.close()
        raise SandboxError(f"No process for programs could be started: {faults}.")

    def _started(self, route: str) -> str:
        self._folder = "" if route != "plain" else tempfile.mkdtemp(prefix="program-")
        has_user = os.geteuid() == 0 and (route == "root" or _can_be_read_by_all())
        user = _other_user() if has_user else -1
        if user >= 0 and self._folder:
            os.chown(self._folder, user, user)
        imports = _imports()
        place = Place(
            route=route,
            readable=_readable(imports),
            imports=imports,
            preload=list(self.preload),
            work=self._folder,
            user=user,
            disk_bytes=self.limits.disk_bytes,
        )
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours = str(Path(__file__).parents[3])
        code = (
            f"import sys; sys.path.append({ours!r}); "
            "from grpo_jax.rewards.sandbox import server; server.main()"
        )
        words = ["-P", "-s", "-S", "-X", "utf8", "-c", code]
        self._process = subprocess.Popen(
            [sys.executable, *words, json.dumps(dataclasses.asdict(place)), str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
            | {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
        )
        theirs.close()
        own.settimeout(_START_LIMIT_S)
        self._socket, self._heard = own, b""
        try:
            self.measures = self.hear()
        except SandboxError as error:
            return str(error)
        return self.measures.get("error", "")

    @property
    def pid(self) -> int:
        """The process that starts programs."""
        return self._process.pid

    def hear(self) -> Any:
        """What the process that starts programs says next; SandboxError if it is gone."""
        try:
            while b"\n" not in self._heard:
                data = self._socket.recv(1 << 16)
                if not data:
                    raise ConnectionError("it has ended")
                self._heard += data
            line, _, self._heard = self._heard.partition(b"\n")
            return json.loads(line)
        except (OSError, ValueError) as error:
            self.close()
            raise SandboxError(f"The process that starts programs has failed: {error}") from error

    @property
    def has_heard(self) -> bool:
        """Whether the process has said something that `hear` has not given yet."""
        return bool(self._heard)

    def close(self) -> None:
        """Ends the process and what it runs."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()
            self._process = None
        if self._folder:
            folder.remove(self._folder)
            self._folder = ""

    # --- Programs ---

    def script(self, code: str, stdin: str = "", seconds: float | None = None) -> Ended:
        """Runs a whole program that reads `stdin` and prints."""
        with self.running("script", code, stdin, seconds) as running:
            return running.until_end()

    @contextlib.contextmanager
    def running(
        self,
        kind: str,
        code: str,
        stdin: str = "",
        seconds: float | None = None,
        peer: socket.socket | None = None,
        cpu_s: float | None = None,
    ) -> Iterator[Running]:
        """A program that is running; it is stopped at the end of the block.

        `peer`: a further socket that it gets. `cpu_s`: if more than `seconds`. Raises SandboxError
        if it cannot be started.
        """
        self.start()
        limits = self.limits
        seconds = limits.seconds if seconds is None else seconds
        memory, disk = limits.memory_bytes, limits.disk_bytes
        order = Order(kind, cpu_s or seconds, memory, limits.processes, disk)
        written = json.dumps(dataclasses.asdict(order)).encode()
        with contextlib.ExitStack() as files:
            text = files.enter_context(_file(code))
            given = files.enter_context(_file(stdin))
            output, printed = os.pipe()
            channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            passed = [text.fileno(), given.fileno(), printed, theirs.fileno()]
            if peer is not None:
                passed.append(peer.fileno())
            try:
                socket.send_fds(self._socket, [written], passed)
                pid = self.hear()
            except (OSError, SandboxError) as error:
                os.close(output)
                channel.close()
                self.close()
                raise SandboxError(str(error)) from error
            finally:
                os.close(printed)
                theirs.close()
        running = Running(self, pid, output, channel, seconds)
        try:
            yield running
        finally:
            try:
                running.stop("")
            finally:
                os.close(output)
                channel.close()


class Running:
    """A program that runs."""

    def __init__(
        self, sandbox: Sandbox, pid: int, output: int, channel: socket.socket, seconds: float
    ):
        self._sandbox, self._pid, self._output, self.channel = sandbox, pid, output, channel
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self._next_look = self.began + _LOOK_EVERY_S
        self._printed: list[bytes] = []
        self._num_printed = 0
        self._said = bytearray()
        self.stopped = ""
        self.end: dict[str, Any] | None = None
        self._open = {output, channel.fileno()}
        for file in self._open:
            os.set_blocking(file, False)

    def until_end(self) -> Ended:
        """Waits until the program ends, or is stopped at a limit."""
        while self.end is None:
            self.step()
        while self._open:  # what is left in the pipes
            if not self._read(0.0):
                break
        return Ended(
            self.end["status"],
            self.stopped,
            b"".join(self._printed),
            bytes(self._said).decode("utf-8", "replace")[:1000],
            time.monotonic() - self.began,
            self.end["cpu_s"],
        )

    def line(self) -> bytes | None:
        """The next line of the channel; None if the program ends before it."""
        while True:
            line, found, rest = self._said.partition(b"\n")
            if found:
                self._said = rest
                return bytes(line)
            if self.channel.fileno() not in self._open:
                return None
            if self.end is None:
                self.step()
            elif not self._read(0.0):
                return None

    def send(self, value: Any) -> None:
        """Sends a line to the program; what it does not read in time stops it."""
        data = json.dumps(value).encode() + b"\n"
        while data and self.end is None:
            try:
                data = data[self.channel.send(data) :]
            except BlockingIOError:
                self.step()
            except OSError:  # it has closed the channel
                return

    def stop(self, why: str) -> None:
        """Ends the program, if it has not ended."""
        if self.end is None:
            self.stopped = self.stopped or why
            with contextlib.suppress(OSError):
                self._sandbox._socket.send(STOP)
            self.end = self._sandbox.hear()

    def step(self) -> None:
        """Waits a little, reads what there is, and stops the program if it is beyond a limit."""
        now = time.monotonic()
        if now >= self.deadline:
            return self.stop("time")
        if now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            if why := self._beyond():
                return self.stop(why)
        self._read(max(min(self.deadline, self._next_look) - now, 0.0))

    def _read(self, wait_s: float) -> bool:
        if self.end is None and self._sandbox.has_heard:
            self.end, wait_s = self._sandbox.hear(), 0.0
        control = self._sandbox._socket.fileno()
        watched = [*self._open, control] if self.end is None else [*self._open]
        ready, _, _ = select.select(watched, [], [], wait_s)
        for file in self._open & set(ready):
            try:
                data = os.read(file, 1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self._open.discard(file)
                continue
            self._num_printed += len(data)
            if file == self._output:
                self._printed.append(data)
            else:
                self._said += data
            if self._num_printed > self._sandbox.limits.output_bytes and self.end is None:
                self.stop("output")
                return False
        if control in ready and self.end is None:
            self.end = self._sandbox.hear()
        return bool(ready)

    def _beyond(self) -> str:
        """The limit that the program with all its children is beyond, or ""."""
        limits, memory, threads = self._sandbox.limits, 0, 0
        for pid in (self._pid, *keeper.below(self._pid)):
            try:
                with open(f"/proc/{pid}/statm") as file:
                    memory += int(file.read().split()[1]) * resource.getpagesize()
                threads += len(os.listdir(f"/proc/{pid}/task"))
            except (OSError, IndexError):  # it has ended, or there is no /proc
                continue
        if memory > limits.memory_bytes + (64 << 20):
            return "memory"
        if threads > limits.processes:
            return "processes"
        if self._sandbox._folder and folder.holds_more(self._sandbox._folder, limits.disk_bytes):
            return "disk"
        return ""


@contextlib.contextmanager
def _file(text: str) -> Iterator[IO[bytes]]:
    """A file in memory that is read from its beginning."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("text", os.MFD_CLOEXEC), "wb+")
    else:
        file = tempfile.TemporaryFile()
    with file:
        file.write(text.encode("utf-8", "replace"))
        file.seek(0)
        yield file


# --- What programs may read -----------------------------------------------------------------------


def _imports() -> list[str]:
    """sys.path of programs: the standard library, and the folders of installed packages."""
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    dynamic = [p for p in sys.path if p.endswith("lib-dynload")]
    installed = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    return [p for p in dict.fromkeys([*standard, *dynamic, *installed]) if os.path.isdir(p)]


def _readable(imports: list[str]) -> list[str]:
    """Folders and files to be read, none within another."""
    base = os.path.join(sys.base_prefix, "lib")
    # Links lead to folders that are in the list themselves.
    paths = [os.path.realpath(p) for p in (*imports, base)] + [*imports, *_SYSTEM, *_ZONES]
    found: list[str] = []
    for path in sorted(set(paths), key=len):
        inside = any(path == f or path.startswith(f"{f}/") for f in found)
        if os.path.exists(path) and not inside:
            found.append(path)
    return found


def _can_be_read_by_all() -> bool:
    path = Path(os.path.realpath(sysconfig.get_path("stdlib")))
    return all(p.stat().st_mode & 0o001 for p in (path, *path.parents))


def _other_user() -> int:
    """A user of no other process, for programs that root starts; -1 if there is none."""
    try:
        with open("/proc/self/uid_map") as file:
            ranges = [tuple(map(int, line.split())) for line in file]
    except (OSError, ValueError):
        return -1
    first, _, count = max(ranges, key=lambda r: r[2])
    if count < 20_000:
        return -1
    return first + min(count, 2_000_000_000) - 2 - (16 * os.getpid() + next(_NUMBERS)) % 19_000
