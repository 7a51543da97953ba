"""What a long run may meet, done to a tiny one: what each fault costs, and what is said of it.

    python tests/runs/fault_campaign.py --out FILE.md [--only WORDS ...] [--root FOLDER]

Every fault is done to a run of its own, which is then started again by the same command until it
ends; it must end as one that was left alone, bit for bit with the same number of processes and to
1e-5 with another. The table is written as it grows, and FILE.json with it. Linux; the full disk
needs root, for a tmpfs. The exit status is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kill_and_resume import differences_beyond, log_differences, place, state_differences

HERE = Path(__file__).resolve().parent
LAUNCH = HERE.parents[1] / "launch" / "local_multiprocess.sh"
STEPS = 40
NUM_KILLS = 50  # four of five of the only process, the others of one of four and of all
EVERY = 3  # steps between saves
LOST_LIMIT_S = 10
OPTIONS = [
    "--config.batch.prompts=8",
    "--config.batch.minibatches=1",
    f"--config.loop.num_steps={STEPS}",
    # With Adam's own, rounding becomes whole steps, and other numbers of processes round otherwise.
    "--config.optim.eps=100.0",
    "--config.optim.learning_rate=50.0",
    "--config.evaluation.num_problems=0",
    f"--config.checkpoint.every_steps={EVERY}",
    f"--config.hosts.heartbeat_timeout_s={LOST_LIMIT_S}",
    "--config.rewards.names=['slow_reward:slow','answer_format']",
    "--config.rewards.weights=[1.0,0.5]",
]
# A reward that can be slowed down without changing the config, so that there is time for a fault.
SLOW = """
import os, time
from grpo_jax.rewards.exact import exact_answer

def slow(**columns):
    time.sleep(float(os.environ.get("SLEEP_S", "0")))
    return exact_answer(**columns)
"""
TOLD = re.compile(r"(?:\[\d\] )?(?:error: |warning: |local_multiprocess: |Stopped by ).*")


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    times: int
    lost: str  # what had to be computed again
    result: str  # how the run that went on compares
    detected: str  # how long until it was known
    message: str


# --- Runs -----------------------------------------------------------------------------------------


class Run:
    """A run of the tiny model in a folder, started as often as it takes."""

    def __init__(self, root: Path, name: str, num: int = 1, *more: str, folder: Path | None = None):
        self.folder = folder or root / name / "run"
        self.num, self._root, self._more = num, root, more
        self.log = root / f"{name}.log"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen | None = None
        self._seen = 0

    def start(self, num: int | None = None, sleep_s: float = 0.0) -> None:
        self._seen = self.log.stat().st_size if self.log.exists() else 0
        self.num = num or self.num
        command = [
            sys.executable,
            "-m",
            "grpo_jax.train",
            "--config",
            str(HERE.parent / "helpers" / "tiny_config.py"),
        ]
        command += ["--workdir", str(self.folder), *OPTIONS, *self._more]
        command += ["--config.model.path", str(self._root / "model" / "export")]
        if self.num > 1:
            command = [str(LAUNCH), str(self.num), *command]
        flags = "--xla_force_host_platform_device_count=1"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=os.environ
                | {
                    "XLA_FLAGS": flags,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # it is compiling that takes the time
                    "XDG_CACHE_HOME": str(self._root / "cache"),
                    "PYTHONPATH": os.pathsep.join([str(self._root), str(HERE.parents[1])]),
                    "SLEEP_S": str(sleep_s),
                    "PYTHONUNBUFFERED": "1",
                },
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        """What was printed since the newest start."""
        with self.log.open("rb") as file:
            file.seek(self._seen)
            return file.read().decode(errors="replace")

    def told(self) -> list[str]:
        """The lines of it that are errors, warnings, or of the launcher."""
        return [m[0] for line in self.said().splitlines() if (m := TOLD.match(line))]

    def step(self) -> int:
        return place(self.folder).step

    def wait_for_step(self, step: float) -> bool:
        """Whether it came there before it ended; so the others."""
        return self._wait(lambda: self.step() >= step)

    def wait_for_words(self, words: str) -> bool:
        return self._wait(lambda: words in self.said())

    def wait_for_progress(self) -> bool:
        return self._wait(lambda: re.search(r"Continuing|step \d+/", self.said()) is not None)

    def wait_for_save(self) -> bool:
        return self._wait(self.is_saving, every_s=0.001)

    def _wait(self, condition: Callable[[], bool], every_s: float = 0.01) -> bool:
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(every_s)
        return True

    def end(self, timeout_s: float = 300) -> int:
        """Its status; it is ended where it does not end."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end within {timeout_s} s: {self.said()[-3000:]}") from None

    def finish(self, num: int | None = None) -> None:
        """Starts it again and waits for its last step."""
        self.start(num)
        status = self.end()
        assert status == 0, f"status {status}: {self.said()[-3000:]}"

    def pids(self) -> list[int]:
        """Its processes, in their order."""
        if self.num == 1:
            return [self.process.pid]
        found = {}
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        for pid in children.stdout.split():
            with contextlib.suppress(OSError):
                variables = Path("/proc", pid, "environ").read_bytes().split(b"\0")
                for variable in variables:
                    if variable.startswith(b"JAX_PROCESS_ID="):
                        found[int(variable.partition(b"=")[2])] = int(pid)
        return [found[number] for number in sorted(found)]

    def continued_from(self) -> int:
        """The step after which the newest start went on; 0 where it began anew."""
        found = re.search(r"Continuing .* after step (\d+)", self.said())
        return int(found[1]) if found else 0

    def is_saving(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    def newest(self) -> Path:
        """The folder of its newest checkpoint."""
        folders = [p for p in (self.folder / "checkpoints").iterdir() if p.name.isdigit()]
        return max(folders, key=lambda p: int(p.name))


class Whole(dict):
    """Runs that were left alone, by their number of processes; made when they are asked for."""

    def __init__(self, root: Path):
        self._root = root

    def __missing__(self, num: int) -> Run:
        self[num] = Run(self._root, f"whole {num}", num)
        if not (self[num].folder / "summary.json").exists():
            self[num].finish()
        return self[num]


def compared(whole: Run, run: Run, *, exactly: bool = True) -> str:
    """How two finished runs compare, in words; those of a difference begin with DIFFERENT."""
    if exactly:
        found = state_differences(whole.folder, run.folder)
        found += log_differences(whole.folder, run.folder)
    else:
        found = differences_beyond(1e-5, whole.folder, run.folder)
    if found:
        return "DIFFERENT: " + "; ".join(found[:3])
    return "equal bit for bit" if exactly else "equal to 1e-5"


def steps(numbers: list[int]) -> str:
    """Steps lost, of one time or several."""
    if len(numbers) == 1:
        return f"{numbers[0]} steps"
    return f"{sum(numbers) / len(numbers):.1f} steps on average, {max(numbers)} at most"


def shown(lines: list[str], *words: str) -> str:
    """The first line with each of the words, or all lines where none are given."""
    picked = [next((line for line in lines if word in line), f"no '{word}'") for word in words]
    return " / ".join(picked or lines)


# --- Faults ---------------------------------------------------------------------------------------


def kills(root: Path, whole: Whole, rng: random.Random) -> Iterator[Row]:
    """kill -9 of the only process at random moments, every second one inside a save."""
    yield from _kills(root, whole, rng, [(1, "the only process", NUM_KILLS * 4 // 5)])


def kills_of_four(root: Path, whole: Whole, rng: random.Random) -> Iterator[Row]:
    """The same of one of four, and of all four."""
    yield from _kills(
        root, whole, rng, [(4, whom, NUM_KILLS // 10) for whom in ("one of four", "all four")]
    )


def _kills(root: Path, whole: Whole, rng: random.Random, cases: list) -> Iterator[Row]:
    for num, whom, count in cases:
        run = Run(root, f"kill {whom}", num)
        lost, seconds, inside, left, lines, at = [], [], 0, 0, [], 0
        for number in range(count):
            run.start(sleep_s=0.05)
            if number and run.wait_for_progress():
                lost.append(at - run.continued_from())
            target = STEPS * (number + rng.uniform(0.0, 0.7)) / count
            if not run.wait_for_step(target):
                break
            if number % 2:
                run.wait_for_save()
                inside += 1
                time.sleep(rng.uniform(0.0, 0.05))
            else:
                time.sleep(rng.uniform(0.0, 0.3))
            pids, began = run.pids(), time.monotonic()
            for pid in pids if whom == "all four" else [rng.choice(pids)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.end()
            seconds.append(time.monotonic() - began)
            left += run.is_saving()
            at, lines = run.step(), run.told() or lines
        run.finish()
        lost.append(at - run.continued_from())
        message = shown(lines) if num > 1 else "Killed, says the shell; then: " + re.search(
            "Continuing .*", run.said())[0]  # fmt: skip
        yield Row(
            f"kill -9 of {whom}, {inside} of them inside a save ({left} left a part of one)",
            len(seconds),
            steps(lost),
            compared(whole[num], run),
            f"{max(seconds):.1f} s at most until all had ended",
            message,
        )


def stops(root: Path, whole: Whole, rng: random.Random) -> Iterator[Row]:
    """What asks a run to save and end."""
    for num, name in ((1, "SIGTERM"), (1, "SIGUSR1"), (4, "SIGTERM")):
        run = Run(root, f"{name} {num}", num)
        run.start(sleep_s=0.2)
        run.wait_for_step(STEPS // 2)
        pid, began = run.pids()[-1], time.monotonic()
        os.kill(pid, getattr(signal, name))
        status, seconds, at = run.end(), time.monotonic() - began, run.step()
        told = run.told()
        run.finish()
        yield Row(
            f"{name} to {'the only process' if num == 1 else 'one of four'} (status {status})",
            1,
            steps([at - run.continued_from()]),
            compared(whole[num], run),
            f"{seconds:.1f} s until saved and ended",
            shown(told, "Stopped by"),
        )
    run = Run(root, "time", 1, "--config.checkpoint.save_before_s=40")
    statuses, lost = [], []
    while not statuses or statuses[-1]:
        at = run.step() if statuses else 0
        run.start(sleep_s=0.4)
        statuses.append(run.end())
        assert statuses[-1] in (0, 75) and len(statuses) < 20, run.said()[-3000:]
        lost.append(at - run.continued_from())
        told = run.told() or told
    yield Row(
        f"checkpoint.save_before_s = 40, the command repeated (status {statuses})",
        len(statuses) - 1,
        steps(lost),
        compared(whole[1], run),
        "by itself",
        shown(told, "Stopped by"),
    )


def stalls(root: Path, whole: Whole, rng: random.Random) -> Iterator[Row]:
    """SIGSTOP of one process of four for longer than the limit."""
    for number in (2, 0):
        run = Run(root, f"stop {number}", 4)
        run.start(sleep_s=0.2)
        run.wait_for_step(STEPS // 2)
        pid, began = run.pids()[number], time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        status, seconds, at = run.end(), time.monotonic() - began, run.step()
        told = run.told()
        run.finish()
        yield Row(
            f"SIGSTOP of process {number} of four (status {status})",
            1,
            steps([at - run.continued_from()]),
            compared(whole[4], run),
            f"{seconds:.1f} s, with hosts.heartbeat_timeout_s = {LOST_LIMIT_S}",
            shown(told),
        )


@contextlib.contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Fills the disk of the file to its last byte."""
    with file.open("ab", buffering=0) as stream:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while stream.write(bytes(size)):
                    pass


def full(root: Path, whole: Whole, rng: random.Random) -> Iterator[Row]:
    """A disk of 16 MB that is full from step 10 on."""
    for case in ("until that is told", "for good"):
        with disk(root / f"disk {case}", 16) as folder:
            run = Run(root, f"full {case}", 1, folder=folder / "run")
            run.start(sleep_s=0.1)
            run.wait_for_step(10)
            ballast, began = folder / "ballast", time.monotonic()
            fill(ballast)
            run.wait_for_words("could not be written")
            seconds, at = time.monotonic() - began, run.step()
            if case == "for good":
                status, at = run.end(), run.step()
                told = run.told()
                ballast.unlink()
                run.finish()
                lost = steps([at - run.continued_from()])
            else:
                ballast.unlink()
                status, told, lost = run.end(), run.told(), "nothing"
            # Compared where the disk is still there.
            result = compared(whole[1], run)
        yield Row(
            f"disk of workdir and checkpoints full {case} (tmpfs of 16 MB; status {status})",
            1,
            lost,
            result,
            f"{seconds:.1f} s, {EVERY} steps to the next save among them",
            shown(told, "metrics.jsonl", "could not be written", *(["error: "] if status else [])),
        )


DAMAGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "with one bit flipped": lambda file: flip(file),
    "deleted": lambda file: file.unlink(),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def damages(root: Path, whole: Whole, rng: random.Random) -> Iterator[Row]:
    """A file of the newest checkpoint that is not what was written."""
    stopped = Run(root, "damaged")
    stopped.start(sleep_s=0.1)
    stopped.wait_for_step(STEPS // 2)
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.end() == 75, stopped.said()
    files = {
        "array file": lambda c: max((c / "state").rglob("d/*"), key=lambda p: p.stat().st_size),
        "manifest of the arrays": lambda c: c / "state" / "manifest.ocdbt",
        "metadata file": lambda c: c / "state" / "_METADATA",
        "record of the sums": lambda c: c / "sha256.json",
    }
    for kind, find in files.items():
        for how, damage in DAMAGES.items():
            run = Run(root, f"{kind} {how}")
            shutil.copytree(stopped.folder, run.folder)
            at = run.step()
            damage(find(run.newest()))
            began = time.monotonic()
            run.start()
            run.wait_for_words("is damaged")
            seconds = time.monotonic() - began
            status = run.end()
            assert status == 0, run.said()[-3000:]
            yield Row(
                f"{kind} of the newest checkpoint {how}",
                1,
                steps([at - run.continued_from()]),
                compared(whole[1], run),
                f"{seconds:.1f} s after the start",
                shown(run.told(), "is damaged"),
            )
            shutil.rmtree(run.folder)


def half(root: Path, whole: Whole, rng: random.Random) -> Iterator[Row]:
    """Half the processes after the loss of all."""
    run = Run(root, "half", 4)
    run.start(sleep_s=0.1)
    run.wait_for_step(STEPS // 2)
    began = time.monotonic()
    for pid in run.pids():
        os.kill(pid, signal.SIGKILL)
    run.end()
    seconds, at, told = time.monotonic() - began, run.step(), run.told()
    run.finish(num=2)
    yield Row(
        "kill -9 of all four, started again as two",
        1,
        steps([at - run.continued_from()]),
        compared(whole[4], run, exactly=False),
        f"{seconds:.1f} s",
        shown(told),
    )


FAULTS = (kills, kills_of_four, stops, stalls, full, damages, half)


# --- The table ------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    titles = ("fault", "times", "lost", "the run that went on", "known after", "what is said")
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(str(x).replace('|', '/') for x in line)} |\n" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--only", nargs="+", choices=[f.__name__ for f in FAULTS], default=[])
    parser.add_argument("--root", type=Path, help="an empty folder to keep all runs in")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = (args.root or Path(temporary)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        (root / "slow_reward.py").write_text(SLOW)
        make = [
            sys.executable,
            "-m",
            "grpo_jax.sft",
            "--config",
            str(HERE.parent / "helpers" / "tiny_config.py"),
        ]
        environment = os.environ | {"XDG_CACHE_HOME": str(root / "cache")}
        subprocess.run([*make, "--workdir", str(root / "model")], env=environment, check=True)
        whole = Whole(root)
        for fault in FAULTS:
            if args.only and fault.__name__ not in args.only:
                continue
            began = time.monotonic()
            for row in fault(root, whole, random.Random(args.seed)):
                rows.append(row)
                args.out.write_text(table(rows).replace(str(root), "..."))
                found = json.dumps([r._asdict() for r in rows], indent=1)
                args.out.with_suffix(".json").write_text(found.replace(str(root), "...") + "\n")
                print(f"{row.fault}: {row.result}", flush=True)
            print(f"({fault.__name__}: {time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(1 if any(row.result.startswith("DIFFERENT") for row in rows) else 0)


if __name__ == "__main__":
    main()
