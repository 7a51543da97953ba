"""Runs a training program several times in one process, stopping it at chosen moments.

`python drive.py JOBS` where JOBS is a JSON list of {"argv": [...], "after": N, "of": "update" or
"sft"}: the run is asked to stop after N updates of GRPO or N steps on given completions in this
process; without "after" it runs to its end. With "in", "rollout", "draw" (the second one of a
step), "rewards", "update" or "evaluation", it ignores that, and is abandoned in the next such
phase, like a run that does not reach its end. With "killed" this process dies there by SIGKILL.
"program" is "train" where it is not given; "environment" are variables from then on; with "command"
it is run as by its command, and is the last of its process; "plain" is the only job, and hears
signals as users' runs do. A job with "code" runs that as a script instead, and ends with what it
printed. Prints one JSON line per job: how it ended. With --serve in
place of JOBS it makes a process for each list that it is asked for; see `driving.py`.

Several processes that a launcher starts do the jobs together.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import compile_once
import shared_programs

from grpo_jax import cli, train
from grpo_jax.hosts import processes
from grpo_jax.run import stop
from grpo_jax.trainers import monitor, restarts, results, rollout
from grpo_jax.trainers.step_metrics import StepLog


class Count:
    """Counts this process's updates since the job began."""

    update = 0
    sft = 0
    grpo = False  # whether its supervised training is over
    evaluating = False


class StopAfter(stop.StopSignal):
    """A stop signal that arrives after a number of updates, and not before."""

    of = "update"
    after: int | None = None
    within = ""  # the phase in which the run is abandoned
    killed = False

    def asked(self):
        self.name = "SIGTEST"
        return not self.within and self._is_due()

    def look(self):
        self.leave("evaluation" if Count.evaluating else "rollout")

    def _is_due(self):
        if self.after is None or (self.of == "update" and not Count.grpo):
            return False
        return getattr(Count, self.of) >= self.after

    def leave(self, phase: str) -> None:
        """Abandons the run, if due, as the thread of signals does."""
        if self.within != phase or not self._is_due():
            return
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        ends: list[str] = []
        end = stop._end
        stop._end = lambda message, status: ends.append(f"{message} (status {status})")
        thread = threading.Thread(target=self._leave, args=[self._way_out])
        thread.start()
        thread.join()
        stop._end = end
        raise stop.Stopped(ends[0])


class CountingLog(StepLog):
    """Counts updates when they are launched."""

    def add_update(self, *args):
        kind = "update" if self._run.course.bar == "step" else "sft"
        setattr(Count, kind, getattr(Count, kind) + 1)
        return super().add_update(*args)


class LeavingMonitor(monitor.Monitor):
    """Reports the phases of the run to the stop signal."""

    def __init__(self, run, *args):
        Count.grpo = run.course.bar == "step"
        super().__init__(run, *args)

    def donates(self, gradients):
        self._stop.leave("update")
        super().donates(gradients)

    def rewards(self, *args):
        self._stop.leave("rewards")
        return super().rewards(*args)


def _draw(run, state, step, number, weights, log, on_harvest):
    if number > state.draw_of(step):
        on_harvest.__self__._stop.leave("draw")  # of the monitor
    return draw(run, state, step, number, weights, log, on_harvest)


def _evaluate(*args, **kwargs):
    Count.evaluating = True
    try:
        return evaluate(*args, **kwargs)
    finally:
        Count.evaluating = False


evaluate, draw = results.evaluate, rollout.draw


def install(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Lets runs of this process be stopped as a job says."""
    shared_programs.share(setattr)
    for module in (train, cli):
        setattr(module, "StopSignal", StopAfter)
    setattr(results, "evaluate", _evaluate)
    setattr(rollout, "draw", _draw)
    setattr(restarts, "Monitor", LeavingMonitor)
    setattr(monitor, "StepLog", CountingLog)


def run_code(code: str) -> str:
    """What a script prints that stands in no file."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "<stdin>", "exec"), module.__dict__)
    return said.getvalue()


def do(job: dict) -> str:
    """Runs a job; returns how it ended."""
    if "code" in job:
        return run_code(job["code"])
    os.environ |= job.get("environment", {})
    Count.update, Count.sft, Count.grpo = 0, 0, False
    StopAfter.after, StopAfter.of = job.get("after"), job.get("of", "update")
    StopAfter.within, StopAfter.killed = job.get("in", ""), job.get("killed", False)
    program = importlib.import_module(f"grpo_jax.{job.get('program', 'train')}")
    if job.get("command"):
        sys.argv = [program.__name__, *job["argv"]]
        cli.main(program.main)
        return "finished"
    try:
        program.main(job["argv"])
        return "finished"
    except stop.Stopped as stopped:
        return str(stopped)
    except ValueError as error:
        return f"error: {error}"


def main(jobs: list[dict]) -> None:
    if not all("code" in job or "plain" in job for job in jobs):
        install()
    compile_once.install()
    gc.set_threshold(100_000, 20, 20)  # as in conftest.py
    for job in jobs:
        print(json.dumps({"end": do(job)}), flush=True)
    processes.shutdown()


def serve() -> None:
    """Does lists of jobs, each in a process that is forked from this one.

    A line of standard input asks for one: its jobs, PYTHONPATH, folder, and file of output. A line
    of standard output tells its status. This process has one thread, and has used no device.
    """
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in each fork"
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if not process:
            return _become(asked)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _become(asked: dict) -> None:
    with open(os.devnull) as nothing, open(asked["output"], "w") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(asked["folder"])
    os.environ["PYTHONPATH"] = asked["paths"]
    sys.path[1:1] = filter(None, asked["paths"].split(os.pathsep))
    main(asked["jobs"])


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    else:
        main(json.loads(sys.argv[1]))
