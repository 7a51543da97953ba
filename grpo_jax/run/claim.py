"""A run's lock on its folder: two runs in one folder would write over each other's files.

`run.lock` in the folder names the process that holds it. If the file system has locks between hosts
(a local disk, NFS, GPFS, Lustre with `flock`), the system holds the claim and releases it when the
process dies. Elsewhere the process writes a heartbeat every few seconds. A run on another host that
sees it change is refused. A run whose host hung, and whose claim was taken over meanwhile, notices
that before it writes again. Process 0 claims the folder for all processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.messages.console import say

NAME = "run.lock"
_BEAT_S = 5.0  # between two heartbeats
_SILENT_S = 20.0  # without a heartbeat, a process on another host counts as ended
_BYTES = 1024  # of the record: a fixed size, so it can be rewritten on a full disk


@dataclasses.dataclass
class _Claim:
    file: int  # open and locked
    record: dict[str, Any]
    lost_to: dict[str, Any] | None = None


_claims: dict[Path, _Claim] = {}
_lock = threading.RLock()
_depth = 0
_over = threading.Event()  # ends the heartbeat thread


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Folders that are claimed while entered are released at the end; may be nested."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            release()


def take(folder: Path) -> None:
    """Claims an existing folder for this process, until `held` or the process ends.

    Raises ValueError if another process holds it. Prints a line if the last holder has died.
    """
    folder = folder.resolve()
    with _lock:
        if folder in _claims:
            return
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _claims[folder] = _taken(folder, file)
        except BaseException:
            os.close(file)
            raise
        if len(_claims) == 1:
            _over.clear()
            threading.Thread(target=_beat, args=[_over], name="claim", daemon=True).start()


def check() -> None:
    """Raises ValueError if another run has taken over a folder."""
    with _lock:
        for folder, claim in _claims.items():
            claim.lost_to = claim.lost_to or _other(folder, claim)
            if claim.lost_to:
                raise ValueError(
                    f"{folder} was taken over by {_named(claim.lost_to)}, because this process had "
                    f"sent no heartbeat for {_SILENT_S:g} s. It ends, and writes nothing more."
                )


def release() -> None:
    """Releases all claimed folders."""
    with _lock:
        _over.set()
        for folder, claim in _claims.items():
            with contextlib.suppress(OSError):
                if _other(folder, claim) is None:
                    os.ftruncate(claim.file, 0)
            os.close(claim.file)
        _claims.clear()


def _taken(folder: Path, file: int) -> _Claim:
    own = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "boot": _boot(),
        "token": secrets.token_hex(8),
        "beat": 0,
    }
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except BlockingIOError:
        raise _refusal(folder, _read(folder / NAME)) from None
    except OSError:  # a file system without locks
        is_locked = False
    holder = _read(folder / NAME)
    if holder and not (is_locked and holder["boot"] == own["boot"]) and _lives(folder, holder):
        raise _refusal(folder, holder)
    if holder:
        say(f"{folder} was held by {_named(holder)}, which has ended without a word. It is free.")
    claim = _Claim(file, own)
    _write(claim)
    return claim


def _refusal(folder: Path, holder: dict[str, Any] | None) -> ValueError:
    who = _named(holder) if holder else "another process"
    return ValueError(
        f"{folder} is in use by {who}. Two runs in one folder would write over each other. Wait "
        "for that one or end it, or give this run its own --workdir (and checkpoint.folder)."
    )


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"


def _lives(folder: Path, holder: dict[str, Any]) -> bool:
    """Whether a holder is alive; waits for its heartbeat."""
    say(f"{folder} is claimed by {_named(holder)}. Waiting for its heartbeat.")
    until = time.monotonic() + _SILENT_S
    while time.monotonic() < until:
        time.sleep(_BEAT_S / 5)
        now = _read(folder / NAME)
        if now is None or now != holder:
            return now is not None
    return False


def _beat(over: threading.Event) -> None:
    while not over.wait(_BEAT_S):
        with _lock, contextlib.suppress(OSError):
            for folder, claim in _claims.items():
                claim.lost_to = claim.lost_to or _other(folder, claim)
                if claim.lost_to is None:
                    claim.record["beat"] += 1
                    _write(claim)


def _other(folder: Path, claim: _Claim) -> dict[str, Any] | None:
    """The process that has taken over a folder from this one; None if none has."""
    found = _read(folder / NAME)
    return found if found and found["token"] != claim.record["token"] else None


def _write(claim: _Claim) -> None:
    text = json.dumps(claim.record).encode()
    os.pwrite(claim.file, text.ljust(_BYTES - 1) + b"\n", 0)
    os.fsync(claim.file)


def _read(path: Path) -> dict[str, Any] | None:
    """The record of a folder's holder; None if nobody holds it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and "token" in found else None
    except (OSError, ValueError):  # being written, or empty
        return None


def _boot() -> str:
    """An id of this boot of this machine, equal in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
