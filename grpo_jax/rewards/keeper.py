"""The parent process of each worker: it ends the worker with all its children, and limits memory.

Reward functions start programs, some of them sandboxes that leave the worker's session. A keeper is
the subreaper of its descendants: orphans become its children, so none escapes. When the trainer
ends for any reason, the keeper ends too, and no process remains. It runs no user code and imports
only the standard library. This needs Linux; elsewhere a worker has no keeper.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time

OUT_OF_MEMORY = 213
"""The keeper's exit status after it ended a worker that held too much memory."""

TOO_MANY_PROCESSES = 214
"""The same after it ended a worker that had started too many processes."""

_LOOK_EVERY_S = 0.2  # between two looks at the memory in use
_END_LIMIT_S = 4.0  # for killed processes to end
_SIGNALS = {signal.SIGCHLD, signal.SIGTERM}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def main(
    descriptor: int,
    trainer: int,
    memory_bytes: int,
    max_processes: int = 0,
    look_every_s: float = _LOOK_EVERY_S,
) -> None:
    """Forks this process into the keeper and the worker; returns in the worker.

    The keeper closes its copy of the worker's pipe, and ends with the worker's exit status.
    SIGTERM, the end of the process `trainer`, more than `memory_bytes` in use or more than
    `max_processes` (0: no limit) end both and all their descendants. It looks at these two every
    `look_every_s`.
    """
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _end_with_parent(prctl, signal.SIGTERM, trainer)
    keeper = os.getpid()
    worker = os.fork()
    if worker:
        os.close(descriptor)
        status = _watch(worker, memory_bytes, max_processes, look_every_s)
        _end_all()
        _end_as(status)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _end_with_parent(prctl, signal.SIGKILL, keeper)


def _end_with_parent(prctl: ctypes._FuncPtr, number: signal.Signals, parent: int) -> None:
    """Sends this process a signal when its parent ends; ends it if the parent has ended already."""
    prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _watch(worker: int, memory_bytes: int, max_processes: int, look_every_s: float) -> int:
    """Waits for the worker's end; returns its exit code as in `subprocess`, or one of ours."""
    memory = Memory(memory_bytes) if memory_bytes else None
    while True:
        if memory is None and not max_processes:
            heard = signal.sigwaitinfo(_SIGNALS)
        else:
            heard = signal.sigtimedwait(_SIGNALS, look_every_s)
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):  # orphans, too
            if ended[0] == worker:
                return os.waitstatus_to_exitcode(ended[1])
        if heard is not None and heard.si_signo == signal.SIGTERM:
            return _status_at_end(worker)
        if memory is None and not max_processes:
            continue
        own = below(os.getpid())
        if max_processes and len(own) > max_processes:
            return TOO_MANY_PROCESSES
        if memory is not None and memory.is_beyond(own):
            return OUT_OF_MEMORY


def _status_at_end(worker: int) -> int:
    """Kills the worker. Returns the exit code of one that was ending by itself, or 0.

    The trainer sees a closed pipe, and asks for the end, before such a worker can be waited for.
    """
    try:
        os.kill(worker, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    limit = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < limit:
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return 0 if code == -signal.SIGKILL else code
        time.sleep(0.001)
    return 0


def _end_all() -> None:
    """Kills all descendants of this process, and waits until they have ended."""
    limit = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < limit:
        for pid in below(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left, since orphans are children too
            return
        time.sleep(0.005)


def _end_as(status: int) -> None:
    """Ends with the worker's exit code, or by the signal that ended the worker."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that waits would be the status
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.kill(os.getpid(), -status)
    os._exit(status)


def end_what_began_since(boot_s: float) -> None:
    """Ends the processes below this worker's keeper that began after a time of CLOCK_BOOTTIME.

    Also those that left the worker's session; not the worker itself.
    """
    least, own = int(boot_s * os.sysconf("SC_CLK_TCK")), os.getpid()
    found = [pid for pid in below(os.getppid()) if pid != own and _began(pid) >= least]
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    limit = time.monotonic() + 0.2
    for pid in found:
        try:
            while not os.waitpid(pid, os.WNOHANG)[0] and time.monotonic() < limit:
                time.sleep(0.001)
        except ChildProcessError:  # it is another's, who waits for it
            pass


def _began(pid: int) -> int:
    """When a process began, in clock ticks since the system did; -1: it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return -1


# --- Processes and their memory -------------------------------------------------------------------


def below(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    todo = [pid]
    while todo:
        parent = todo.pop()
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    todo += map(int, file.read().split())
        except OSError:  # it has ended
            pass
        found.append(parent)
    return found[1:]


class Memory:
    """Checks the total memory of some processes against a limit; shared memory counts once."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._harmless = limit_bytes  # resident bytes up to which the cheap check suffices

    def is_beyond(self, pids: list[int]) -> bool:
        """Whether the total is above the limit.

        Resident sizes are cheap to read, but count mapped files, and shared memory several times.
        So the exact sizes are read only if the resident sizes are large.
        """
        resident = sum(map(_resident_bytes, pids))
        if resident <= self._harmless:
            return False
        held = sum(map(held_bytes, pids))
        self._harmless = max(self._limit, resident + self._limit - held)
        return held > self._limit


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # it has ended
        return 0


def held_bytes(pid: int) -> int:
    """Bytes of a process that no file on disk backs, with its share of shared memory."""
    held = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    held += int(line.split()[1]) * 1024
    except OSError:
        pass
    return held
