"""The asking of a run to stop: heard, told, and obeyed where nothing else hears."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo_jax.run import stop as stop_lib


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_answered(number, capsys):
    before = signal.getsignal(number)
    with stop_lib.StopSignal() as stop:
        assert not stop.asked()
        signal.raise_signal(number)
        assert stop.asked() and stop.name == signal.Signals(number).name
    assert signal.getsignal(number) is before
    again = " once more" if number == signal.SIGINT else ""
    said = f"{stop.name}: stopping, and saving first. Ctrl-C{again} ends it without.\n"
    assert capsys.readouterr().out == said


def test_the_end_of_its_time_is_noted(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(stop_lib, "_STARTED", now)
    with stop_lib.StopSignal(0) as never, stop_lib.StopSignal(1e4) as later:
        assert not never.asked() and not later.asked()
    with stop_lib.StopSignal(100) as stop:
        assert not stop.asked()
        monkeypatch.setattr(stop_lib, "_STARTED", now - 101)
        assert stop.asked() and stop.name == "checkpoint.save_before_s = 100"


def test_a_second_interrupt_ends_at_once():
    with stop_lib.StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.asked() and stop.name == "SIGTERM"


def test_in_a_thread_a_run_goes_on_without_signals():
    found = []

    def run():
        with stop_lib.StopSignal(1e6) as stop:
            found.append(stop.asked())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGTERM) is before


def test_what_takes_long_is_given_up_a_moment_later(monkeypatch):
    with stop_lib.StopSignal() as stop:
        stop.look()
        signal.raise_signal(signal.SIGTERM)
        stop.look()  # it may come to its end
        monkeypatch.setattr(stop_lib, "_FINISH_S", 0.0)
        with pytest.raises(stop_lib.Stopped, match="Stopped by SIGTERM; what the run has computed"):
            with stop.nothing_to_lose():
                stop.look()


PROGRAM = """
import signal, sys, threading, time
from grpo_jax.run import stop as stop_lib
stop_lib.PATIENCE_S = 0.2
def save():
    if case == "fails":
        raise OSError("the disk is gone")
    return "Saved what there was."
case = sys.argv[1]
with stop_lib.StopSignal(may_exit=case != "called") as stop:
    with stop.leaving(save, 0.2) as over:
        if case == "too late":
            over()
        print("ready", flush=True)
        ends = time.monotonic() + (3 if case in ("too late", "called") else 60)
        # The main thread hears no signal, as in a compiler.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        while time.monotonic() < ends:
            time.sleep(0.1)
    print("went on", stop.asked(), flush=True)
"""


@pytest.mark.parametrize(
    ("case", "status", "told"),
    [
        ("hears nothing", 75, "Saved what there was."),
        ("fails", 1, "error: what was computed could not be saved: the disk is gone"),
        ("too late", 0, "went on True"),  # the state is being donated
        ("called", 0, "went on True"),  # by another program, which is not ended
    ],
)
def test_a_run_that_hears_nothing_is_left(case, status, told):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, case], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=50)
    first, last = out.splitlines()
    assert first.startswith("SIGTERM: stopping, and saving first.") and last == told
    assert process.returncode == status


def test_before_anything_is_computed_it_ends_at_once():
    code = PROGRAM.split("with stop_lib")[0] + (
        "with stop_lib.StopSignal(may_exit=True) as stop, stop.nothing_to_lose():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, ""], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "Stopped by SIGUSR1; what the run has computed" in out
