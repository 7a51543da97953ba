"""Witnesses of processes that do nothing: who is told to be lost, and how the others end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_jax.hosts import loss_monitor

# A process of a run, as far as its witness can tell: it lives until it is told to go.
PROCESS = f"""
import json, os, select, subprocess, sys
setting = json.loads(sys.argv[1]) | {{"parent": os.getpid()}}
beside = subprocess.Popen(
    [sys.executable, "-I", {str(Path(loss_monitor.__file__))!r}],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
)
def tell(line):
    beside.stdin.write(line.encode() + b"\\n")
    beside.stdin.flush()
tell(json.dumps(setting))
if setting["hub"] is None:
    print(beside.stdout.readline().decode().strip(), flush=True)
while not select.select([sys.stdin], [], [], 0.1)[0]:
    tell("alive")
tell("bye")
sys.exit(beside.wait())
"""
LOST_S = 2.0


class Process:
    def __init__(self, number: int, hub: list | None, token: str = "secret"):
        setting = {
            "hub": hub,
            "process": number,
            "name": f"process {number} (here)",
            "lost_s": LOST_S,
            "token": token,
        }
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROCESS, json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Its status, and what it and its witness said."""
        status = self.popen.wait(timeout=30)
        return status, self.popen.stderr.read()

    def goodbye(self) -> tuple[int, str]:
        """The same of one that says that it goes."""
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        return self.end()


@pytest.fixture
def three():
    """A run of three, all known to the hub."""
    first = Process(0, None)
    port = int(first.popen.stdout.readline())
    processes = [first, *(Process(number, ["127.0.0.1", port]) for number in (1, 2))]
    _wait_for_connections(port, 2)
    yield processes
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.popen.kill()


def _wait_for_connections(port: int, count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        rows = [r.split() for f in ("tcp", "tcp6") for r in Path("/proc/net", f).open()][1:]
        # Local port, state 01: established, of either end.
        if sum(r[1].endswith(f":{port:04X}") and r[3] == "01" for r in rows) == count:
            time.sleep(0.5)  # until the hub has read who they are
            return
        time.sleep(0.05)
    raise AssertionError("the witnesses did not come")


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_killed_is_named_and_the_others_end(three, lost):
    three[lost].popen.kill()
    for number, process in enumerate(three):
        status, said = process.end()
        reason = f"process {lost} (here) died without a word: it was killed"
        if number == lost:
            assert (status, said.count("\n")) == (-signal.SIGKILL, 1)
            assert said.startswith(f"error: {reason}")
        else:
            assert status == -signal.SIGABRT
            assert said.startswith(f"error: process {number} (here) ends, because {reason}")


@pytest.mark.parametrize("lost", [0, 2])
def test_one_that_is_stopped_is_named_and_all_end(three, lost):
    began = time.monotonic()
    three[lost].popen.send_signal(signal.SIGSTOP)
    for number, process in enumerate(three):
        status, said = process.end()
        assert status == -(signal.SIGKILL if number == lost else signal.SIGABRT)
        assert (
            f"process {lost} (here) sent no heartbeat for hosts.heartbeat_timeout_s = 2 s: it is "
            "stopped, or its host hangs." in said
        )
    assert time.monotonic() - began >= LOST_S


def test_a_host_that_is_gone_is_named(three):
    """Its witness, too, without a word."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(three[1].popen.pid)], capture_output=True, text=True
    )
    three[1].popen.send_signal(signal.SIGSTOP)  # it must not speak for itself
    os.kill(int(children.stdout), signal.SIGKILL)
    status, said = three[2].end()
    assert status == -signal.SIGABRT
    assert "because process 1 (here) and its witness are gone" in said


def test_those_that_say_goodbye_are_not_missed(three):
    """One that ends with a message of its own; the others hear of that from itself."""
    assert three[2].goodbye() == (0, "")
    time.sleep(2 * LOST_S)
    assert three[0].popen.poll() is None and three[1].popen.poll() is None
    for process in (three[1], three[0]):
        assert process.goodbye() == (0, "")


def test_who_does_not_know_the_token_is_not_heard():
    first = Process(0, None)
    port = int(first.popen.stdout.readline())
    for text in (
        b'fault [1, "not so"]\n',
        json.dumps(["wrong", 1, "process 1"]).encode() + b'\nfault [1, "not so"]\n',
        b"[]\n",
        b"\xff" * 20_000,
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(text)
            stranger.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(100):  # signs of life, until it is shown the door
                    pass
    assert first.goodbye() == (0, "")
