"""Runs the training program several times in one process, stopping it at chosen moments.

`python drive.py JOBS` where JOBS is a JSON list of {"argv": [...], "after": N, "of": "update" or
"sft"}: the run is asked to stop after N updates of GRPO or N supervised steps in this process;
without "after" it runs to its end. With "in", "rollout", "rewards", "update" or "evaluation", it
does not hear that, and is left in the next such phase, as one that does not come to its end.
Prints one JSON line per job: how it ended.
"""

from __future__ import annotations

import json
import sys
import threading

import shared_programs

from grpo_jax import lines, loop, metrics, saving, train
from grpo_jax import stop as stop_lib


class Count:
    """What this process has done since the job began."""

    update = 0
    sft = 0
    grpo = False  # whether its supervised training is over
    evaluating = False


class StopAfter(stop_lib.StopSignal):
    """A stop signal that arrives after a number of updates, and not before."""

    of = "update"
    after: int | None = None
    within = ""  # the phase in which the run is left

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
        """Leaves the run as the thread that hears signals does, where that is due."""
        if self.within != phase or not self._is_due():
            return
        ends: list[str] = []
        stop_lib._end = lambda message, status: ends.append(f"{message} (status {status})")
        thread = threading.Thread(target=self._leave, args=[self._way_out])
        thread.start()
        thread.join()
        raise stop_lib.Stopped(ends[0])


def _counted(function, kind):
    def call(*args, **kwargs):
        if kind == "update" or str(args[0].folder).endswith("bootstrap"):
            setattr(Count, kind, getattr(Count, kind) + 1)
        return function(*args, **kwargs)

    return call


class CountingWriters(metrics.Writers):
    """Counts the supervised steps that are written."""

    def __init__(self, folder, **kwargs):
        self.folder = folder
        Count.grpo = not str(folder).endswith("bootstrap")
        super().__init__(folder, **kwargs)


class LeavingSaver(saving.Saver):
    """Tells the stop signal of updates, once their gradients are launched."""

    def may_stop_update(self, *args):
        context, stop = super().may_stop_update(*args), self._stop

        class Told:
            def __enter__(self):
                before_donating = context.__enter__()

                def told(gradients):
                    stop.leave("update")
                    before_donating(gradients)

                return told

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Told()


def _evaluate(*args, **kwargs):
    Count.evaluating = True
    try:
        return evaluate(*args, **kwargs)
    finally:
        Count.evaluating = False


def _score(parts, guards, saver, *args):
    saver._stop.leave("rewards")
    return score(parts, guards, saver, *args)


evaluate, score = loop._evaluate, loop._score


def main(jobs: list[dict]) -> None:
    shared_programs.share()
    train.StopSignal, loop.Saver = StopAfter, LeavingSaver
    loop._evaluate, loop._score = _evaluate, _score
    lines.Lines.learned = _counted(lines.Lines.learned, "update")
    CountingWriters.scalars = _counted(metrics.Writers.scalars, "sft")
    metrics.Writers = CountingWriters
    for job in jobs:
        Count.update, Count.sft, Count.grpo = 0, 0, False
        StopAfter.after, StopAfter.of = job.get("after"), job.get("of", "update")
        StopAfter.within = job.get("in", "")
        try:
            train.main(job["argv"])
            end = "finished"
        except stop_lib.Stopped as stopped:
            end = str(stopped)
        except ValueError as error:
            end = f"error: {error}"
        print(json.dumps({"end": end}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
