"""What surrounds the phases of a run."""

from __future__ import annotations

import signal
import subprocess
import sys

# A run that was asked to stop, gives up what it does, and takes long to save.
PROGRAM = """
import threading, time
from types import SimpleNamespace
from grpo_jax.run import stop as stop_lib
from grpo_jax.trainers.monitor import Monitor
from grpo_jax.trainers.run_state import RunState

def saved(state, sizes):
    print("saved by", threading.current_thread().name, flush=True)
    time.sleep(1.0)
    return "All is saved."

stop_lib.PATIENCE_S, stop_lib._FINISH_S = 0.3, 0.0
with stop_lib.StopSignal(may_exit=True) as stop:
    monitor = SimpleNamespace(
        _run=SimpleNamespace(sizes={}),
        _stop=stop,
        log=SimpleNamespace(fetch=lambda: None, close=lambda: None),
        guards=SimpleNamespace(has_orders=False, enforce=lambda before: None),
        _saved=saved,
    )
    try:
        with Monitor._may_stop(monitor, RunState()):
            print("ready", flush=True)
            while True:
                stop.look()
                time.sleep(0.01)
    except stop_lib.Stopped as stopped:
        print(stopped)
"""


def test_what_stops_a_run_does_not_save_while_the_run_itself_does():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    heard, *told = out.splitlines()
    assert heard.startswith("SIGTERM: stopping, and saving first.")
    assert told == ["saved by MainThread", "All is saved."]
