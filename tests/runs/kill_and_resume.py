"""Kills a run at random moments and checks that it ends with the very weights of one left alone.

    python tests/runs/kill_and_resume.py [--config FILE] [--kills 5] [--seed 0] [overrides...]
    python tests/runs/kill_and_resume.py --program dpo --config configs/dpo.py

runs the config once without interruption, then in another folder, where it is killed with SIGKILL
that many times and started again each time. The program is `grpo_jax.train` if none is given. With
--stop the last of these is a SIGTERM, which the run obeys: it saves and ends with status 75.
Parameters and optimizer state at the end must be equal bit for bit, and every step must stand in
the metrics once with the same values; else the exit status is 1. Overrides are written as for the
program: `--config.loop.num_steps=20`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.run.append_log import read_jsonl

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"
# Metrics that differ from run to run.
TIMES = (
    *("time/", "throughput/", "roofline/", "memory/", "programs"),
    *("environment/seconds", "environment/idle", "environment/restarts"),
    *("judge/calls", "judge/cached_share", "judge/retries", "judge/seconds", "judge/failed_by_"),
    *("judge/prompt_tokens", "judge/completion_tokens"),  # a resumed run asks for less
    *("sft/tokens_per_s", "preference/tokens_per_s", "reward_model/tokens_per_s"),
)


# --- What a run left ------------------------------------------------------------------------------


def final_state(folder: Path, item: str = "state") -> dict[str, np.ndarray]:
    """Parameters, optimizer state and counters of the newest checkpoint, by their names.

    Or the arrays of another item.
    """
    folder = (folder / "checkpoints").absolute()
    newest = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    return arrays_of(folder / str(newest), item)


def arrays_of(checkpoint: Path, item: str = "state") -> dict[str, np.ndarray]:
    """The arrays of an item of a checkpoint, by their names."""
    path = checkpoint.absolute() / item
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(
            path,
            restore_args=_as_numpy(reader.metadata(path).item_metadata.tree),
        )
    return dict(_leaves(tree))


def _as_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _as_numpy(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_as_numpy(v) for v in tree]
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return [] if tree is None else [(prefix, np.asarray(tree))]
    return [leaf for name, value in items for leaf in _leaves(value, f"{prefix}/{name}")]


def state_differences(a: Path, b: Path) -> list[str]:
    """The arrays of two runs' newest checkpoints that differ in any bit."""
    left, right = final_state(a), final_state(b)
    assert any("params" in name for name in left) and any("mu" in name for name in left), list(left)
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left
        or name not in right
        or left[name].dtype != right[name].dtype
        or left[name].tobytes() != right[name].tobytes()
    )


def logged(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A log's lines in their order, without times, throughput and memory."""
    rows = read_jsonl(folder / name)
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def log_differences(a: Path, b: Path) -> list[str]:
    """What differs between two runs' metrics and samples, in a few words each."""
    found = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        left, right = logged(a, name), logged(b, name)
        steps = [[row["step"] for row in rows] for rows in (left, right)]
        if steps[0] != steps[1]:
            found.append(f"{name}: steps {steps[0]} and {steps[1]}")
            continue
        for one, other in zip(left, right):
            names = [n for n in one.keys() | other.keys() if one.get(n) != other.get(n)]
            if names:
                found.append(f"{name}: step {one['step']}: {', '.join(sorted(names))}")
    return found


def differences_beyond(tolerance: float, a: Path, b: Path) -> list[str]:
    """Where two runs differ by more than that: parameters, optimizer, metrics; texts at all."""
    left, right = final_state(a), final_state(b)
    assert left.keys() == right.keys()
    found = [n for n in left if not np.allclose(left[n], right[n], rtol=0, atol=tolerance)]
    steps = [[row for row in logged(f) if "reward" in row] for f in (a, b)]
    for one, other in zip(*steps, strict=True):
        names = {n for n in one.keys() | other.keys() if not n.startswith("eval/")}
        found += [
            f"step {one['step']}: {n}"
            for n in sorted(names)
            if not np.isclose(one[n], other[n], rtol=0, atol=tolerance)
        ]
    texts = [
        [(row["step"], row["completion"], row["rewards"]) for row in logged(f, "samples.jsonl")]
        for f in (a, b)
    ]
    return found + [f"sample {x}" for x, y in zip(*texts, strict=True) if x != y]


# --- Killing --------------------------------------------------------------------------------------


class Place(NamedTuple):
    """How far a run is."""

    sft: int  # supervised steps written
    step: int  # GRPO steps written

    def fraction(self, end: Place) -> float:
        """How much of the run is done, its two trainings counting equally."""
        parts = [done / total for done, total in zip(self, end) if total]
        return sum(parts) / len(parts)

    def __str__(self) -> str:
        return f"step {self.step}" if self.step else f"supervised step {self.sft}"


def place(folder: Path) -> Place:
    """How far the logs say that a run is."""

    def written(file: Path) -> int:
        rows = list(read_jsonl(file)) if file.exists() else []
        return max((row["step"] for row in rows if "eval/accuracy" not in row or len(row) > 9),
                   default=0)  # fmt: skip

    return Place(written(folder / "bootstrap" / "metrics.jsonl"), written(folder / "metrics.jsonl"))


def checkpoint(folder: Path) -> str:
    """The newest whole checkpoint that a restart will find."""
    for name, part in (("", folder), ("supervised ", folder / "bootstrap")):
        numbers = [int(p.name) for p in (part / "checkpoints").glob("*") if p.name.isdigit()]
        if numbers:
            return f"{name}update {max(numbers)}"
        if not name and (folder / "bootstrap" / "export" / "config.json").exists():
            return "the supervised model"
    return "the beginning"


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log").open("ab")
    command = [*command, "--workdir", str(folder)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait():
        print(folder.with_suffix(".log").read_text()[-4000:])
        sys.exit(f"The run in {folder} ended with status {process.returncode}.")


def run(command: list[str], root: Path, kills: int, seed: int, stops: bool = False) -> bool:
    """Both runs and the table of kills; True when nothing differs."""
    whole, killed = root / "whole", root / "killed"
    began = time.monotonic()
    _finish(_start(command, whole), whole)
    duration_s, end = time.monotonic() - began, place(whole)
    print(f"Uninterrupted: {end} after {duration_s:.1f} s in {whole}\n", flush=True)

    # One kill in each equal part of the run, at a progress and a moment after it drawn at random:
    # by progress and not by time, so that a fast machine's kills fall where a slow one's do.
    rng = random.Random(seed)
    unit_s = duration_s / (end.sft + end.step)
    print("| kill | seconds | killed at | continues from |\n|---|---|---|---|", flush=True)
    for number in range(kills):
        target, delay_s = (number + rng.uniform(0.0, 0.7)) / kills, rng.uniform(0.0, unit_s)
        began = time.monotonic()
        process = _start(command, killed)
        while process.poll() is None and place(killed).fraction(end) < target:
            time.sleep(0.01)
        time.sleep(delay_s)
        if process.poll() is not None:
            _finish(process, killed)
            print(f"| {number + 1} | | finished before it was killed | |", flush=True)
            break
        if stops and number == kills - 1:
            process.send_signal(signal.SIGTERM)
            said = killed.with_suffix(".log")
            if process.wait(300) != 75 or "Stopped by SIGTERM at step" not in said.read_text():
                sys.exit(f"SIGTERM did not stop the run: see {said}.")
        else:
            process.send_signal(signal.SIGKILL)
            process.wait()
        seconds, at = time.monotonic() - began, place(killed)
        print(f"| {number + 1} | {seconds:.1f} | {at} | {checkpoint(killed)} |", flush=True)
    _finish(_start(command, killed), killed)

    differences = state_differences(whole, killed) + log_differences(whole, killed)
    arrays = final_state(whole)
    print()
    if differences:
        print("DIFFERENT: " + "; ".join(differences[:10]))
    else:
        size = sum(a.nbytes for a in arrays.values())
        print(f"EQUAL bit for bit: {len(arrays)} arrays, {size:,} bytes; metrics and samples too.")
    return not differences


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--program", default="train", help="of grpo_jax, such as dpo")
    parser.add_argument("--config", type=Path, default=QUICKSTART, metavar="FILE")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--stop", action="store_true", help="end the last time by SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--root", type=Path, help="an empty folder to keep both runs in")
    args, overrides = parser.parse_known_args(argv)
    if args.root and args.root.exists() and os.listdir(args.root):
        parser.error(f"--root {args.root} is not empty.")
    command = [sys.executable, "-m", f"grpo_jax.{args.program}", "--config", str(args.config)]
    with tempfile.TemporaryDirectory() as temporary:
        where = args.root or Path(temporary)
        equal = run([*command, *overrides], where, args.kills, args.seed, args.stop)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
