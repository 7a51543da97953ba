"""The process that imports the user's module once, and forks a process for each live environment.

Here is no JAX, and one thread: a fork is then a copy in milliseconds that shares what was imported.
The trainer asks with `{"spawn": number}` and a socket, or `{"end": number}`; told are
`{"ready": ...}` or `{"fault": ...}` once, and `{"ended": number, "status": ...}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import pickle
import select
import signal
import socket
import sys
from collections.abc import Callable

from grpo_jax.environments import child, described, wire
from grpo_jax.environments.described import CLASSES, TOOLS, RefusedError, told
from grpo_jax.rewards import given, keeper, registry, sources, worker

MAX_PROCESSES = 64  # of an environment, itself included
_LOOK_EVERY_S = 1.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is imported, received once."""

    tools: tuple[str, ...]  # module:function
    classes: tuple[tuple[str | None, str], ...]  # name and module:Class
    rewards: tuple[tuple[str, str], ...] = ()  # name and entry of rewards.names
    memory_bytes: int = 0
    sources: dict[str, sources.Source] = dataclasses.field(default_factory=dict)
    given: dict[str, bytes] = dataclasses.field(default_factory=dict)  # from `given.pickled`


def main(descriptor: int) -> None:
    """Imports, then forks, until the trainer is gone."""
    worker.hide_secrets()
    sock = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    setup: Setup = pickle.loads(wire.read(sock))
    for name in ("jax", "jaxlib"):
        sys.modules[name] = None  # an import of it is an ImportError
    sys.meta_path.insert(0, sources.Finder(setup.sources))
    try:
        found = _found(setup)
    except BaseException as error:  # SystemExit, too
        text = str(error) if isinstance(error, (RefusedError, ValueError)) else None
        fault = text or f"{CLASSES}: {type(error).__name__}: {told(error)}"
        wire.write(sock, json.dumps({"fault": fault}).encode())
        return
    held = {
        name: [source.file, source.is_package, source.text.decode("latin-1")]
        for name, source in sources.held().items()
        if not name.startswith("grpo_jax.")
    }
    ready = {"sources": held, "threads": _threads()}
    wire.write(sock, json.dumps({"ready": ready}).encode())
    gc.collect()
    gc.freeze()  # the collector would write to what the forks share
    with contextlib.suppress(OSError):  # the trainer is gone
        _serve(sock, found, keeper.held_bytes(os.getpid()) + setup.memory_bytes)


def _found(setup: Setup) -> child.Found:
    given.receive(setup.given)
    tools, specs = {}, {}
    for spec in setup.tools:
        function = described.find(spec, TOOLS)
        name = getattr(function, "__name__", "operation")
        if name in tools:
            raise RefusedError(f"{TOOLS}: {specs[name]!r} and {spec!r} are both called {name!r}.")
        tools[name], specs[name] = function, spec
    classes = {name: (spec, described.find(spec, CLASSES)) for name, spec in setup.classes}
    rewards = {name: registry.function(spec) for name, spec in setup.rewards}
    return child.Found(tools, specs, classes, rewards, setup.memory_bytes)


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def _serve(sock: socket.socket, found: child.Found, memory_bytes: int) -> None:
    """Forks and reaps. `memory_bytes`: the limit of a fork, what is shared included."""
    bell, ring = os.pipe()
    for end in (bell, ring):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    if not found.memory_bytes:
        memory_bytes = 0
    numbers: dict[int, int] = {}  # of the forks, by process id

    def in_fork() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sock.close()
        os.close(bell), os.close(ring)

    while True:
        ready, _, _ = select.select([sock, bell], [], [], _LOOK_EVERY_S)
        if bell in ready:
            os.read(bell, 4096)
        while numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid in numbers:
                ended = {"ended": numbers.pop(pid), "status": os.waitstatus_to_exitcode(status)}
                wire.write(sock, json.dumps(ended).encode())
        if sock not in ready:
            continue
        try:
            data, theirs = wire.read_with_socket(sock)
        except (EOFError, OSError):  # the trainer is gone; this process's keeper ends the forks
            return
        asked = json.loads(data)
        if "spawn" in asked:
            pid = _fork(theirs, found, memory_bytes, in_fork)
            numbers[pid] = asked["spawn"]
            os.close(theirs)
        else:
            for pid in [pid for pid, number in numbers.items() if number == asked["end"]]:
                _end(pid)


def _fork(theirs: int, found: child.Found, memory_bytes: int, in_fork: Callable) -> int:
    """Forks a keeper, which forks the process of an environment; the keeper's process id."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        in_fork()
        keeper.main(theirs, parent, memory_bytes, MAX_PROCESSES)
        if sys.platform != "linux":
            os.setsid()
        child.main(theirs, found)
    finally:
        os._exit(1)


def _end(pid: int) -> None:
    """Asks a keeper to end what it keeps; where there are no keepers, kills the session."""
    try:
        if sys.platform == "linux":
            os.kill(pid, signal.SIGTERM)
        else:
            os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
