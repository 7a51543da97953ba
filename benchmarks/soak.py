"""Whether a long run stays as it was after its first steps: memory, programs, open files, speed.

    python benchmarks/soak.py [--steps 2000] [--json FILE]

trains the smallest model that has every part of a run, with samples, evaluations and checkpoints
every 20 steps, looks at its processes four times a second, and compares an early tenth of the steps
with the last: the second, or the first without a new program, since a program stays in memory. It
learns next to nothing, so that completions stay as long as they are and a step does the same all
along. Speed is CPU time a step, which other work on the machine disturbs less than seconds. Linux
alone. The status is 1 where one of them grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from grpo_jax.run.append_log import read_jsonl

CONFIG = Path(__file__).parents[1] / "tests" / "helpers" / "tiny_config.py"
EVERY = 20
LIMIT = 1.05  # times what it was


def command(folder: Path, steps: int) -> list[str]:
    options = {
        "loop.num_steps": steps,
        "optim.learning_rate": 1e-9,
        "evaluation.every_steps": EVERY,
        "checkpoint.every_steps": EVERY,
        "logging.samples_every_steps": EVERY,
    }
    return [
        *(sys.executable, "-m", "grpo_jax.train", "--config", str(CONFIG)),
        *("--workdir", str(folder)),
        *(f"--config.{name}={value}" for name, value in options.items()),
    ]


def children(pid: int) -> list[int]:
    """Processes that this one started, the rewards' workers among them."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def look_at(pid: int) -> dict[str, float]:
    """What a process holds now, and the CPU time that it has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in (pid, *children(pid))]
    return {
        "cpu_s": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "threads": float(fields[17]),
        "open files": float(len(os.listdir(f"/proc/{pid}/fd"))),
        "memory, MiB": pages[0] * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "memory of its children, MiB": sum(pages[1:]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def watch(folder: Path, steps: int) -> list[dict[str, float]]:
    """Runs it; each look with the step that was done by then."""
    log, looks, step, place = folder / "metrics.jsonl", [], 0, 0
    with (folder.parent / "log.txt").open("w") as output:
        process = subprocess.Popen(command(folder, steps), stdout=output, stderr=output)
        while process.poll() is None:
            if log.exists():
                with log.open() as file:
                    file.seek(place)
                    for line in iter(file.readline, ""):
                        if not line.endswith("\n"):
                            break
                        place, step = place + len(line.encode()), json.loads(line)["step"]
                try:
                    looks.append({"step": step} | look_at(process.pid))
                except OSError:  # it, or a worker, has just ended
                    pass
            time.sleep(0.25)
    if process.returncode:
        sys.exit(f"the run ended with status {process.returncode}: {folder.parent / 'log.txt'}")
    return looks


def settled(programs: list[float]) -> int:
    """The first tenth, from the second on, in which no program is new; `programs` by tenth."""
    last = next(i for i in range(10) if programs[i] == programs[-1])
    return max(1, min(last + (last > 0), 8))


def compare(
    rows: list[dict[str, float]], looks: list[dict[str, float]], steps: int, early: int
) -> dict[str, list[float]]:
    """Each measure, in the tenth `early` of the steps, counted from 0, and in the last."""
    spans = [(early * steps // 10, (early + 1) * steps // 10), (steps - steps // 10, steps)]

    def both(of: Callable[[int, int], float]) -> list[float]:
        return [float(of(first, last)) for first, last in spans]

    def cpu_of_step(first: int, last: int) -> float:
        inside = [x for x in looks if first <= x["step"] < last]
        return (inside[-1]["cpu_s"] - inside[0]["cpu_s"]) / (inside[-1]["step"] - inside[0]["step"])

    found = {"CPU seconds a step": both(cpu_of_step)}
    for name in looks[0].keys() - {"step", "cpu_s"}:
        found[name] = both(
            lambda a, b, n=name: np.median([x[n] for x in looks if a <= x["step"] < b])
        )
    for name in ("programs", "completion/length"):
        found[name] = both(
            lambda a, b, n=name: np.median([r[n] for r in rows if a <= r["step"] < b])
        )
    return dict(sorted(found.items()))


def by_tenth(
    rows: list[dict[str, float]], looks: list[dict[str, float]], steps: int
) -> dict[str, list[float]]:
    """Medians of what a new program adds to, in each tenth of the steps."""
    found = {}
    for name, of in (("memory, MiB", looks), ("programs", rows)):
        tenths = [[x[name] for x in of if x["step"] * 10 // steps == i] for i in range(10)]
        found[name] = [float(np.median(tenth)) for tenth in tenths]
    return found


def main() -> None:
    """Prints the table; ends with status 1 where something grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        looks = watch(folder, args.steps)
        rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "reward" in row]
        tenths = by_tenth(rows, looks, args.steps)
        early = settled(tenths["programs"])
        found = compare(rows, looks, args.steps, early)
    print(
        f"| {args.steps:,} steps | tenth {early + 1} | last tenth | ratio |\n"
        "| --- | --- | --- | --- |"
    )
    for name, (before, after) in found.items():
        print(f"| {name} | {before:.4g} | {after:.4g} | {after / before:.3f} |")
    for name, values in tenths.items():
        print(f"{name} by tenths of the run: {', '.join(f'{x:.4g}' for x in values)}")
    if args.json:
        content = {"found": found, "tenths": tenths, "looks": looks}
        args.json.write_text(json.dumps(content) + "\n")
    grown = [n for n, (before, after) in found.items() if after > LIMIT * before]
    if grown:
        sys.exit(f"grown: {', '.join(grown)}")


if __name__ == "__main__":
    main()
