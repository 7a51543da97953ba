"""Runs the training program several times in one process, stopping it at chosen moments.

`python drive.py JOBS` where JOBS is a JSON list of {"argv": [...], "after": N, "of": "update" or
"sft"}: the run is asked to stop after N updates of GRPO or N supervised steps in this process;
without "after" it runs to its end. Prints one JSON line per job: how it ended.
"""

from __future__ import annotations

import json
import sys

from grpo_jax import lines, metrics, train, workdir


class Count:
    """What this process has done since the job began."""

    update = 0
    sft = 0
    grpo = False  # whether its supervised training is over


class StopAfter:
    """A stop signal that arrives after a number of updates, and not before."""

    name = "SIGTEST"
    of = "update"
    after: int | None = None

    def __init__(self, save_before_s):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def asked(self):
        if self.after is None or (self.of == "update" and not Count.grpo):
            return False
        return getattr(Count, self.of) >= self.after


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


def main(jobs: list[dict]) -> None:
    workdir.StopSignal = StopAfter
    lines.Lines.learned = _counted(lines.Lines.learned, "update")
    CountingWriters.scalars = _counted(metrics.Writers.scalars, "sft")
    metrics.Writers = CountingWriters
    for job in jobs:
        Count.update, Count.sft, Count.grpo = 0, 0, False
        StopAfter.after, StopAfter.of = job.get("after"), job.get("of", "update")
        try:
            train.main(job["argv"])
            end = "finished"
        except workdir.Stopped as stopped:
            end = str(stopped)
        except ValueError as error:
            end = f"error: {error}"
        print(json.dumps({"end": end}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
