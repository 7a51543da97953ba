"""The process that starts programs: shut in once, warm, and forked for each program.

It knows nothing that a program must not know: its environment is empty, and code, input and output
go through files of the caller, which it passes to the program unread. It imports the standard
library alone, and speaks to the caller (`client.py`) through one socket.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import sys
from typing import Any

from grpo_jax.rewards.sandbox import filters, folder, linux, program

STOP = b"stop"
FILES = 64  # in the work folder, and open at once
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Place:
    """Where programs run, decided at the start; written as JSON."""

    route: str  # "root", "user" or "plain"; see `client.ROUTES`
    readable: list[str]  # folders and files that programs may read
    imports: list[str]  # sys.path of programs
    preload: list[str]  # modules imported once, for all programs
    work: str  # the work folder, where there is no root of its own
    user: int  # programs run as this user; -1: as the caller
    disk_bytes: int  # that all files of a program may have together


@dataclasses.dataclass(frozen=True)
class Order:
    """One program to run; written as JSON. Its files: code, stdin, stdout, channel, others."""

    kind: str  # of `program.KINDS`
    cpu_s: float
    memory_bytes: int
    processes: int
    file_bytes: int


class Server:
    """Runs one program after the other."""

    def __init__(self, place: Place, caller: socket.socket):
        self.place, self.caller = place, caller
        self.has_own_root = place.route != "plain"
        self.ruleset: int | None = None
        self.group = os.getgid() if place.user < 0 else place.user
        self.user = os.getuid() if place.user < 0 else place.user
        sys.path[:] = place.imports
        for name in place.preload:
            importlib.import_module(name)
        self.own_bytes = _address_space()
        self.shut_in()
        self.has_filter = self._can(lambda: linux.no_new_privs() or _try_filter())
        gc.collect()
        gc.freeze()  # children then copy less memory

    def shut_in(self) -> None:
        """Enters namespaces, or makes a Landlock ruleset; raises OSError if the route is closed."""
        place, new = self.place, linux.NEW_MOUNTS | linux.NEW_NETWORK | linux.NEW_IPC
        self.work = place.work
        if self.has_own_root:
            if place.route == "user":
                user, group = os.getuid(), os.getgid()
                linux.unshare(linux.NEW_USER | new | linux.NEW_NAMES)
                linux.map_own_user(user, group)
            else:
                linux.unshare(new | linux.NEW_NAMES)
            linux.make_root(place.readable)
            self.work = "/work"
            self.clear(first=True)
            return
        self.clear(first=True)
        if linux.is_here():
            linux.become_subreaper()
        try:
            self.ruleset = linux.landlock(place.readable, [place.work])
        except OSError:
            pass

    @staticmethod
    def _can(step) -> bool:
        """Whether a step is possible here: tried in a child, since there is no way back."""
        pid = os.fork()
        if pid == 0:
            try:
                step()
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(pid, 0)[1] == 0

    def measures(self) -> dict[str, bool]:
        """What is in force, for the caller."""
        return {
            "namespaces": self.has_own_root,
            "landlock": self.ruleset is not None,
            "filter": self.has_filter,
            "user": self.place.user >= 0,
        }

    # --- The work folder ---

    def clear(self, first: bool = False) -> None:
        """Makes the work folder empty again, if anything was changed in it."""
        if not first and os.stat(self.work).st_ctime_ns == self.clean:
            return
        if self.has_own_root:
            if not first:
                linux.unmount(self.work)
            linux.mount_work(self.work, self.user, self.group, self.place.disk_bytes, FILES + 1)
        else:
            os.chmod(self.work, 0o700)
            folder.empty(self.work)
        self.clean = os.stat(self.work).st_ctime_ns

    # --- One program after the other ---

    def serve(self) -> None:
        """Runs orders until the caller has gone."""
        self.say(self.measures())
        while True:
            text, files, _, _ = socket.recv_fds(self.caller, 4096, 8)
            if not text:
                return
            text = text.removeprefix(STOP)  # of a program that has ended meanwhile
            if not text:
                continue
            order = Order(**json.loads(text))
            pid = linux.fork_into_new_pids() if self.has_own_root else os.fork()
            if pid == 0:
                status = 1
                try:
                    self.enter(order, files)
                    status = program.run(order.kind)
                finally:
                    os._exit(status)
            for file in files:
                os.close(file)
            self.say(pid)
            self.say(self.watch(pid))
            self.clear()  # while the caller goes on

    def say(self, what: Any) -> None:
        """Tells the caller something, in a line."""
        self.caller.sendall(json.dumps(what).encode() + b"\n")

    def watch(self, pid: int) -> dict:
        """Waits for a program's end, which the caller may ask for; its status and cost."""
        if self._is_stopped(pid):
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        if not self.has_own_root:
            _end_rest(pid)
        spent_s = usage.ru_utime + usage.ru_stime
        return {"status": os.waitstatus_to_exitcode(status), "cpu_s": spent_s}

    def _is_stopped(self, pid: int) -> bool:
        """Waits for a program's end, or until the caller stops it."""
        if not hasattr(os, "pidfd_open"):
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if select.select([self.caller], [], [], 0.01)[0]:
                    self._heard(pid)
                    return True
            return False
        end = os.pidfd_open(pid)
        try:
            if end in select.select([end, self.caller], [], [])[0]:
                return False
        finally:
            os.close(end)
        self._heard(pid)
        return True

    def _heard(self, pid: int) -> None:
        if not self.caller.recv(16):  # the caller has gone
            os.kill(pid, signal.SIGKILL)
            os._exit(0)

    # --- In the program's process ---

    def enter(self, order: Order, files: list[int]) -> None:
        """Gives this process, just forked, its files and takes everything else from it."""
        os.setsid()
        code, stdin, stdout, *others = files
        nowhere = os.open("/dev/null", os.O_WRONLY)
        kept = [stdin, stdout, nowhere, code, *others]
        top = [os.dup2(file, 100 + i) for i, file in enumerate(kept)]
        ruleset = None if self.ruleset is None else os.dup2(self.ruleset, 99)
        for i, file in enumerate(top):
            os.dup2(file, i)
        os.closerange(len(kept), 99 if ruleset is not None else 1 << 20)
        os.closerange(100, 1 << 20)
        os.chdir(self.work)
        _limit(order, self.own_bytes, self.has_own_root or self.place.user >= 0)
        if self.place.user >= 0:
            os.setgroups([])
            os.setresgid(self.group, self.group, self.group)
            os.setresuid(self.user, self.user, self.user)
        if linux.is_here():
            linux.drop_capabilities()
            linux.no_new_privs()
            linux.end_with_parent()
        if ruleset is not None:
            linux.enter_landlock(ruleset)
            os.close(ruleset)
        os.environ["TMPDIR"] = os.environ["HOME"] = self.work
        random.seed(0)  # programs draw the same numbers in each run
        if self.has_filter:
            own = None if self.has_own_root else os.getpid()
            counts = os.getuid() != 0  # the kernel counts no processes of root
            linux.enter_filter(filters.program(own_pid=own, may_fork=counts))


def _limit(order: Order, own_bytes: int, has_own_user: bool) -> None:
    seconds = int(order.cpu_s) + 1
    limits = {
        "CPU": (seconds, seconds + 1),
        "AS": order.memory_bytes + own_bytes,
        "FSIZE": order.file_bytes,
        "NOFILE": FILES,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "SIGPENDING": 64,
        "STACK": min(64 * _MIB, order.memory_bytes // 4),
    }
    if has_own_user:
        limits["NPROC"] = order.processes
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        soft, hard = value if isinstance(value, tuple) else (value, value)
        most = resource.getrlimit(number)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        try:
            resource.setrlimit(number, (soft, hard))
        except (OSError, ValueError):  # macOS refuses some
            pass


def _try_filter() -> None:
    linux.enter_filter(filters.program(own_pid=os.getpid()))


def _address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # a root of its own has no /proc
        return 256 * _MIB


def _end_rest(pid: int) -> None:
    """Ends what a program has started, where no namespace does so."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    try:
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                left = file.read().split()
            for child in left:
                os.kill(int(child), signal.SIGKILL)
            if not left:
                return
            os.waitpid(-1, 0)
    except (OSError, ChildProcessError):
        pass


def main() -> None:
    """Reads the place from the command line, and serves the socket that it names."""
    place = Place(**json.loads(sys.argv[1]))
    caller = socket.socket(fileno=int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    try:
        server = Server(place, caller)
    except (OSError, ImportError) as error:
        caller.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    server.serve()
