"""Hybrids on a task on which GRPO alone gets no reward from its start, and GRPO alone beside them.

    python benchmarks/hybrid.py --out FOLDER [--seeds 0 1 2] [--methods control hpt ...] [--steps N]

Every seed has one model from supervised training, from which every method of configs/hybrid.py
starts; "control" is the same config without a hybrid. What is there in FOLDER is not run again. It
prints a table, and writes FOLDER/hybrid.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from grpo_jax.run.append_log import read_jsonl

CONFIG = Path(__file__).parents[1] / "configs" / "hybrid.py"
CONTROL = "control"
# Schedules for runs of so few steps; the defaults are the papers'.
OPTIONS = {
    "chord": {"hybrid.mix_decay_steps": 40},
    "chord_phi": {"hybrid.mix_decay_steps": 40},
    "uft": {"hybrid.hint_steps": 40, "hybrid.nll_coef": 0.1},
}


def run(folder: Path, program: str, **options: object) -> list[dict]:
    """The metrics of a run of the config with other options, made once."""
    if not (folder / "summary.json").is_file() and not (folder / "export").is_dir():
        command = [sys.executable, "-m", f"grpo_jax.{program}", "--config", str(CONFIG)]
        command += ["--workdir", str(folder), *(f"--config.{k}={v}" for k, v in options.items())]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    return list(read_jsonl(folder / "metrics.jsonl"))


def start(out: Path, seed: int) -> Path:
    """The folder of the supervised model of a seed."""
    folder = out / f"start-{seed}"
    run(folder, "sft", **{"seed": seed, "evaluation.num_problems": 0, "hybrid.method": ""})
    return folder / "export"


def trained(out: Path, method: str, seed: int, steps: int) -> list[dict]:
    """The metrics of a run with this method, from the start of its seed."""
    options = {
        "seed": seed,
        "model.path": start(out, seed),
        "sft.num_steps": 0,
        "hybrid.method": "" if method == CONTROL else method,
        **OPTIONS.get(method, {}),
    }
    options |= {"loop.num_steps": steps} if steps else {}
    return run(out / f"{method}-{seed}", "train", **options)


def told(rows: list[dict]) -> dict[str, float]:
    """What the table says of a run."""
    accuracy = {int(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    rewards = {int(row["step"]): row["reward"] for row in rows if "reward" in row}
    rewarded = [step for step, reward in sorted(rewards.items()) if reward > 0]
    last = [reward for step, reward in sorted(rewards.items())][-5:]
    return {
        "before": accuracy[min(accuracy)],
        "after": accuracy[max(accuracy)],
        "reward": sum(last) / max(len(last), 1),
        "rewarded_steps": len(rewarded),
        "steps": len(rewards),
        "first": rewarded[0] if rewarded else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[CONTROL, "hpt"])
    parser.add_argument("--steps", type=int, default=0, help="0: those of the config")
    args = parser.parse_args()
    found: dict[str, dict[int, dict[str, float]]] = {}
    for seed in args.seeds:
        for method in args.methods:
            rows = trained(args.out, method, seed, args.steps)
            found.setdefault(method, {})[seed] = told(rows)
            print(method, seed, found[method][seed], flush=True)
    print("| method | seed | held out before | after | sampled reward at the end | first reward |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method, by_seed in found.items():
        for seed, one in by_seed.items():
            first = f"step {one['first']}" if one["first"] else f"none in {one['steps']} steps"
            print(
                f"| {method} | {seed} | {one['before']:.1%} | {one['after']:.1%} | "
                f"{one['reward']:.3f} | {first} |"
            )
    (args.out / "hybrid.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
