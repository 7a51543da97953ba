"""A phase that does not get on is told."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading

import pytest

from grpo_jax.watchdog import Watchdog


def test_the_phase_that_stalls_is_named():
    told = queue.SimpleQueue()
    with Watchdog(0.2, told.put) as watchdog:
        watchdog.phase("The rewards of step 7")
        message = told.get(timeout=10)
    assert message == "The rewards of step 7: no progress for loop.stall_limit_s = 0.2 s."


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
from grpo_jax.watchdog import Watchdog
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
