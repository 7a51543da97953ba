"""What this system keeps programs from: a program tries it all at a run's start."""

from __future__ import annotations

import functools
import json
import os
import socket
import tempfile

from grpo_jax.messages.console import say
from grpo_jax.rewards.sandbox.client import Ended, Limits, Sandbox

_LIMITS = Limits(seconds=20.0, memory_bytes=256 << 20, processes=8, disk_bytes=4 << 20)

# Each that is asked for is tried; a function that returns has escaped.
_ATTEMPTS = """
import ctypes, json, os, socket, time
asked = json.loads(input())

def reads(): open(asked["file"]).close()
def writes(): open(asked["file"], "a").close()
def creates(): open(asked["file"] + ".new", "w").close()
def connects(): socket.create_connection(("127.0.0.1", asked["port"]), 2)
def signals(): os.kill(asked["pid"], 0)
def looks(): open(f"/proc/{asked['pid']}/environ").read(1)
def traces():
    if ctypes.CDLL(None).ptrace(16, asked["pid"], None, None) < 0: raise OSError
def roots(): os.chroot("/")
def allocates(): bytearray(asked["memory"])
def fills():
    for i in range(9):
        with open(f"f{i}", "wb") as file: file.write(bytes(asked["disk"] // 4))
    time.sleep(1)
def forks():
    ends = os.pipe()
    for _ in range(asked["processes"]):
        if os.fork() == 0:
            os.close(ends[1]); os.read(ends[0], 1); os._exit(0)
    time.sleep(1)

for name in asked["names"]:
    try: globals()[name]()
    except BaseException: print(name, "kept", flush=True)
    else: print(name, "escaped", flush=True)
"""
_MEANINGS = {
    "reads": "reading files of yours",
    "writes": "writing to files of yours",
    "creates": "creating files outside of its folder",
    "connects": "the network",
    "signals": "signals to other processes",
    "looks": "the environment of other processes",
    "traces": "the memory of other processes",
    "roots": "rights of root",
    "allocates": "more memory than its limit",
    "fills": "more of the disk than its limit",
    "forks": "more processes than its limit",
}


@functools.cache
def found() -> tuple[dict[str, bool], dict]:
    """What a program is kept from, by name as in `_MEANINGS`, and the measures in force."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as listener,
        Sandbox(_LIMITS) as sandbox,
    ):
        os.chmod(folder, 0o777)
        file = os.path.join(folder, "file")
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY))
        os.chmod(file, 0o666)
        sandbox.start()
        asked = {
            "file": file,
            "port": listener.getsockname()[1],
            "pid": sandbox.pid,
            "memory": 2 * _LIMITS.memory_bytes,
            "disk": _LIMITS.disk_bytes,
            "processes": 2 * _LIMITS.processes,
        }
        kept = {}
        alone = ("allocates", "fills", "forks")  # a limit may stop the program at each
        for names in ([n for n in _MEANINGS if n not in alone], *([n] for n in alone)):
            done = sandbox.script(_ATTEMPTS, json.dumps(asked | {"names": names}))
            kept |= _read(done, names)
        return kept, sandbox.measures


def _read(done: Ended, names: list[str]) -> dict[str, bool]:
    """Whether each of the attempts has failed: as the program says, or by being stopped in it."""
    said = dict(line.split() for line in done.output.decode().splitlines())
    return {name: said.get(name, done.stopped and "kept") == "kept" for name in names}


def check(level: str) -> None:
    """Says what programs are not kept from here; ValueError if there is such and `level` is "full".

    SandboxError if no program can be started at all.
    """
    kept, measures = found()
    open_ = [_MEANINGS[name] for name, is_kept in kept.items() if not is_kept]
    if not open_:
        return
    missing = f"{'; '.join(open_)}. In force: {_said(measures)}"
    if level == "full":
        raise ValueError(
            'rewards.code_isolation = "full", but on this system a program of a completion is not '
            f"kept from {missing}. Allow user namespaces or Landlock (Linux 5.13), run in a "
            'container of its own, or accept it with rewards.code_isolation = "limits".'
        )
    say(f"Programs of completions are not kept from {missing}.")


def _said(measures: dict) -> str:
    named = [n for n in ("namespaces", "landlock", "filter", "user") if measures.get(n)]
    faults = "; ".join(f"{route}: {fault}" for route, fault in measures["faults"].items())
    return (", ".join(named) or "limits alone") + (f" ({faults})" if faults else "")
