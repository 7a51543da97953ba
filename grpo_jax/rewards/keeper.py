"""The process above each worker: it ends the worker with all that it started, and limits memory.

Reward functions start programs, among them sandboxes that leave the worker's session. What is
orphaned below a keeper becomes its child, so that nothing gets away; and when the trainer ends,
however it ends, the keeper does, and nothing remains. It runs no code of the user and imports
nothing but the standard library. Only Linux has what this needs: elsewhere a worker stands alone.
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

_LOOK_EVERY_S = 0.2  # at the memory that is held
_END_LIMIT_S = 4.0  # for killed processes to go away
_SIGNALS = {signal.SIGCHLD, signal.SIGTERM}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def main(descriptor: int, trainer: int, memory_bytes: int) -> None:
    """Makes two of this process, the keeper and the worker, and returns in the worker.

    The keeper closes the worker's pipe and ends as the worker ends. SIGTERM, or the end of the
    process `trainer`, ends both and all below them; so do more than `memory_bytes` that are held
    there. 0: no limit.
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
        status = _watch(worker, memory_bytes)
        _end_all()
        _end_as(status)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _end_with_parent(prctl, signal.SIGKILL, keeper)


def _end_with_parent(prctl: ctypes._FuncPtr, number: signal.Signals, parent: int) -> None:
    """This process gets the signal when its parent ends; it ends now if that has ended before."""
    prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _watch(worker: int, memory_bytes: int) -> int:
    """Waits for the worker's end; its exit code as in `subprocess`, or OUT_OF_MEMORY."""
    memory = Memory(memory_bytes) if memory_bytes else None
    while True:
        if memory is None:
            heard = signal.sigwaitinfo(_SIGNALS)
        else:
            heard = signal.sigtimedwait(_SIGNALS, _LOOK_EVERY_S)
        if heard is not None and heard.si_signo == signal.SIGTERM:
            return 0
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):  # orphans, too
            if ended[0] == worker:
                return os.waitstatus_to_exitcode(ended[1])
        if memory is not None and memory.is_beyond(below(os.getpid())):
            return OUT_OF_MEMORY


def _end_all() -> None:
    """Kills all that is left below this process, and waits until it is gone."""
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
        except ChildProcessError:  # none is left: orphans are children, too
            return
        time.sleep(0.005)


def _end_as(status: int) -> None:
    """Ends with the exit code of the worker, by its signal if that ended it."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- Processes and their memory -------------------------------------------------------------------


def below(pid: int) -> list[int]:
    """The processes that a process started, and those that these did."""
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
    """Whether processes hold more than a limit together, shared memory counted once."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._harmless = limit_bytes  # resident bytes up to which there is no need to look closer

    def is_beyond(self, pids: list[int]) -> bool:
        """Resident sizes are cheap, but count mapped files, and what is shared repeatedly."""
        resident = sum(map(_resident_bytes, pids))
        if resident <= self._harmless:
            return False
        held = sum(map(_held_bytes, pids))
        self._harmless = max(self._limit, resident + self._limit - held)
        return held > self._limit


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # it has ended
        return 0


def _held_bytes(pid: int) -> int:
    """What a process holds of memory that no file on a disk backs: its part of what is shared."""
    held = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    held += int(line.split()[1]) * 1024
    except OSError:
        pass
    return held
