"""Accuracy over generated tokens, with and without `prompts.drop_equal_groups`.

    python benchmarks/equal_groups.py --out FOLDER [--seeds 0 1 2] [--tokens 250000]

The task is the quickstart's. Every seed has one model from supervised training, from which both
runs start; each ends once its completions have reached the number of tokens and it is evaluated.
The learning rate is constant, so that a run's updates do not depend on how many it will make. What
is there in FOLDER is not run again. It prints the held-out accuracy at equal tokens, and draws
FOLDER/equal_groups.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import objectives

import grpo_jax
from grpo_jax.run.append_log import read_jsonl
from grpo_jax.trainers.listeners import Step

RUNS = {
    "all groups": {"prompts__drop_equal_groups": False},
    "those with a gradient": {"prompts__drop_equal_groups": True, "prompts__per_draw": 16},
}
SHARES = 0.25, 0.5, 0.75, 1.0  # of the tokens


def trained(out: Path, name: str, seed: int, tokens: int, steps: int) -> list[dict]:
    """The metrics of a run, made once by a process of its own."""
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    if not (folder / "ended").is_file():
        asked = {"name": name, "seed": seed, "tokens": tokens, "steps": steps}
        asked |= {"folder": str(folder), "model": str(objectives.start(out, seed))}
        with open(out / f"{folder.name}.log", "w") as log:
            command = [sys.executable, __file__, "--run", json.dumps(asked)]
            subprocess.run(command, check=True, stdout=log, stderr=log, env=dict(os.environ))
        (folder / "ended").touch()
    return list(read_jsonl(folder / "metrics.jsonl"))


def run(asked: dict) -> None:
    """One run, until its tokens or steps are reached."""

    def enough(step: Step) -> None:
        if step.metrics.get("tokens/generated", 0) >= asked["tokens"] and is_evaluated(step):
            step.stop()

    def is_evaluated(step: Step) -> bool:
        return "eval/accuracy" in step.metrics

    chosen = {name.replace("__", "."): value for name, value in RUNS[asked["name"]].items()}
    grpo_jax.train(
        asked["model"],
        config=str(objectives.CONFIG),
        workdir=asked["folder"],
        callbacks=[enough],
        seed=asked["seed"],
        **chosen,
        **{
            "sft.num_steps": 0,
            "algorithm.kl_coef": 0.0,
            "optim.schedule": "constant",
            "loop.num_steps": asked["steps"],
            "evaluation.every_steps": 2,
            "evaluation.num_samples": 0,
            "checkpoint.every_steps": 0,
        },
    )


def curve(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Generated tokens and held-out accuracy in percent, wherever it was measured."""
    found = [row for row in rows if "eval/accuracy" in row]
    tokens = [row.get("tokens/generated", 0.0) for row in found]
    return np.array(tokens), 100 * np.array([row["eval/accuracy"] for row in found])


def told(rows: list[dict]) -> str:
    """Steps and tokens of a run, and the share of equal groups in its updates and draws."""
    steps = [row for row in rows if "groups/equal_share" in row]
    share = np.mean([row["groups/equal_share"] for row in steps])
    drawn = [row["groups/dropped"] / row["groups/drawn"] for row in steps if "groups/drawn" in row]
    dropped = f", {np.mean(drawn):.0%} of the groups dropped" if drawn else ""
    tokens = steps[-1]["tokens/generated"]
    return f"{len(steps)} steps, {tokens:,.0f} tokens, {share:.0%} equal groups in updates{dropped}"


def draw(found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]], file: Path) -> None:
    """A line for each run, in one color for both."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from grpo_jax.metrics.curves import COLORS

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for color, (name, by_seed) in zip(COLORS, found.items()):
        for n, (tokens, accuracy) in enumerate(by_seed.values()):
            axes.plot(tokens / 1000, accuracy, color=color, label=None if n else name)
    axes.set_xlabel("generated tokens, thousands")
    axes.set_ylabel("held-out accuracy, %")
    axes.legend(frameon=False)
    axes.grid(color="#e3e6ea")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--steps", type=int, default=200, help="most of a run")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(json.loads(args.run))
        return
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in RUNS}
    for seed in args.seeds:
        for name in RUNS:
            rows = trained(args.out, name, seed, args.tokens, args.steps)
            found[name][seed] = curve(rows)
            print(f"{name}, seed {seed}: {told(rows)}", flush=True)
    least = min(tokens[-1] for by_seed in found.values() for tokens, _ in by_seed.values())
    at = [least * share for share in SHARES]
    print(f"| held-out accuracy, % | seed | {' | '.join(f'{n / 1000:.0f} k tokens' for n in at)} |")
    print(f"| --- | --- |{' --- |' * len(at)}")
    for name, by_seed in found.items():
        values = {seed: np.interp(at, *both) for seed, both in by_seed.items()}
        for seed, row in [*values.items(), ("mean", np.mean([*values.values()], axis=0))]:
            print(f"| {name} | {seed} | {' | '.join(f'{x:.1f}' for x in row)} |")
    draw(found, args.out / "equal_groups.png")


if __name__ == "__main__":
    main()
