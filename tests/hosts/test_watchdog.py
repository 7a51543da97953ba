"""A phase that does not get on is told."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading

import pytest

from grpo_jax.hosts.watchdog import Watchdog


def test_the_phase_that_stalls_is_named():
    told = queue.SimpleQueue()
    with Watchdog(0.2, told.put) as watchdog:
        watchdog.phase("The rewards of step 7")
        message = told.get(timeout=10)
    assert message == "The rewards of step 7: no progress for loop.stall_timeout_s = 0.2 s."


def test_what_gets_on_is_left_alone():
    """Signs of life for three times the limit, then none."""
    told, rest = queue.SimpleQueue(), threading.Event()
    with Watchdog(0.5, told.put) as watchdog:
        watchdog.phase("Update 1")
        for _ in range(15):
            watchdog.alive()
            rest.wait(0.1)
        assert told.empty()
        assert told.get(timeout=10).startswith("Update 1")


@pytest.mark.parametrize("limit_s", [0.0, 0.2])
def test_it_watches_within_its_context_and_only_with_a_limit(limit_s):
    told = queue.SimpleQueue()
    with Watchdog(limit_s, told.put):
        pass
    threading.Event().wait(0.4)
    assert told.empty()


def test_a_stalled_program_ends_and_shows_where():
    code = """
import time
from grpo_jax.hosts.watchdog import Watchdog
def wait_forever():
    time.sleep(60)
with Watchdog(0.2) as watchdog:
    watchdog.phase("Update 3 of step 7")
    wait_forever()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "error: Update 3 of step 7: no progress" in done.stderr
    assert "wait_forever" in done.stderr


def test_time_in_which_all_was_stopped_is_nobody_s_silence():
    """SIGSTOP for twice the limit, as by Ctrl-Z or a scheduler's suspend; then it stalls."""
    code = """
import time
from grpo_jax.hosts.watchdog import Watchdog
with Watchdog(3.0) as watchdog:
    watchdog.phase("Update 1")
    print("ready", flush=True)
    while not input():
        pass
    watchdog.phase("Update 2")
    print("went on", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    threading.Event().wait(0.8)  # until it has looked: what it looks at for the first time is new
    process.send_signal(signal.SIGSTOP)
    threading.Event().wait(6.5)
    process.send_signal(signal.SIGCONT)
    threading.Event().wait(0.5)  # a watchdog that counts the time ends it here
    process.stdin.write("on\n")
    process.stdin.flush()
    assert process.stdout.readline() == "went on\n"
    _, told = process.communicate(timeout=50)
    assert process.returncode == 1 and "error: Update 2: no progress" in told
