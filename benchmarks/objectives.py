"""Objectives beside each other on the quickstart's task: accuracy over generated tokens.

    python benchmarks/objectives.py --out FOLDER [--seeds 0 1 2] [--steps 12] [--only gspo cispo]

Every seed has one model from supervised training, from which each objective starts. A step draws 16
prompts with 8 completions and makes four updates, since with one update most objectives are the
same. "sft" goes on with supervised training on as many tokens as "grpo" has generated. What is
there in FOLDER is not run again. It prints a table, and draws FOLDER/objectives.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from grpo_jax.run.append_log import read_jsonl

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
PRESETS = (
    *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce"),
    *("luspo", "vespo", "gmpo", "dppo", "maxrl", "reinforce_pp"),
)
USUAL = (*PRESETS[:8], "sft")
EVERY = 1


def run(folder: Path, program: str, **options: object) -> list[dict]:
    """The metrics of a run of the quickstart's config with other options, made once."""
    if not (folder / "summary.json").is_file() and not (folder / "export").is_dir():
        arguments = [f"--config.{k.replace('__', '.')}={v}" for k, v in options.items()]
        command = [sys.executable, "-m", f"grpo_jax.{program}", "--config", str(CONFIG)]
        command += ["--workdir", str(folder), *arguments]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=dict(os.environ))
    return list(read_jsonl(folder / "metrics.jsonl"))


def start(out: Path, seed: int) -> Path:
    """The folder of the supervised model of a seed."""
    few = {"loop__num_steps": 1, "optim__schedule": "constant", "optim__warmup_steps": 0}
    run(out / f"start-{seed}", "train", seed=seed, evaluation__every_steps=0, **few)
    return out / f"start-{seed}" / "bootstrap" / "export"


def trained(out: Path, preset: str, seed: int, steps: int) -> list[dict]:
    """The metrics of a run with this objective."""
    return run(
        out / f"{preset}-{seed}",
        "train",
        seed=seed,
        model__path=start(out, seed),
        algorithm__preset=preset,
        algorithm__kl_coef=0.0,
        sft__num_steps=0,
        batch__prompts=16,
        batch__minibatches=4,
        optim__learning_rate=3e-5,
        loop__num_steps=steps,
        evaluation__every_steps=EVERY,
        evaluation__num_samples=0,
        checkpoint__every_steps=0,
    )


def imitated(out: Path, seed: int, tokens: float) -> list[dict]:
    """The metrics of supervised training on as many tokens from the same model."""
    batch, mean = 64, 20.0
    before = list(read_jsonl(out / f"start-{seed}" / "bootstrap" / "metrics.jsonl"))
    told = [row["sft/tokens"] / batch for row in before if "sft/tokens" in row]
    mean = float(np.mean(told)) if told else mean
    steps = max(int(tokens / batch / mean), 1)
    return run(
        out / f"sft-{seed}",
        "sft",
        seed=seed + 1000,  # other problems than those it has seen
        model__path=start(out, seed),
        sft__num_steps=steps,
        sft__learning_rate=2e-4,
        evaluation__every_steps=max(steps // 6, 1),
        evaluation__num_samples=0,
        checkpoint__every_steps=0,
    )


def accuracy(rows: list[dict]) -> dict[int, float]:
    """Held-out accuracy by step."""
    return {int(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row}


def draw(found: dict[str, dict[int, dict[int, float]]], file: Path) -> None:
    """A line for each objective: the mean over seeds, and the range as a band."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from grpo_jax.metrics.curves import COLORS

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    x = np.linspace(0, 1, 61)
    for i, (name, by_seed) in enumerate(found.items()):
        values = [
            np.interp(x, np.array(sorted(c)) / max(c), [100 * c[step] for step in sorted(c)])
            for c in by_seed.values()
        ]
        style = "-" if i < len(COLORS) else "--"
        color = COLORS[i % len(COLORS)]
        axes.plot(x, np.mean(values, 0), style, color=color, label=name)
        axes.fill_between(
            x, np.min(values, 0), np.max(values, 0), color=color, alpha=0.12, linewidth=0
        )
    axes.set_xlabel("share of the tokens")
    axes.set_ylabel("held-out accuracy, %")
    axes.legend(ncols=3, frameon=False)
    axes.grid(color="#e3e6ea")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="+", default=USUAL, choices=(*PRESETS, "sft"))
    args = parser.parse_args()
    found: dict[str, dict[int, dict[int, float]]] = {}
    for seed in args.seeds:
        for name in args.only:
            if name == "sft":
                of_grpo = trained(args.out, "grpo", seed, args.steps)
                tokens = max(row.get("tokens/generated", 0.0) for row in of_grpo)
                rows = imitated(args.out, seed, tokens)
            else:
                rows = trained(args.out, name, seed, args.steps)
            found.setdefault(name, {})[seed] = accuracy(rows)
            print(name, seed, found[name][seed], flush=True)
    print("| objective | before | after, by seed | mean | gain, points |")
    print("| --- | --- | --- | --- | --- |")
    for name, by_seed in found.items():
        first = 100 * np.array([curve[min(curve)] for curve in by_seed.values()])
        last = 100 * np.array([curve[max(curve)] for curve in by_seed.values()])
        each = ", ".join(f"{x:.1f}" for x in last)
        print(
            f"| {name} | {first.mean():.1f} | {each} | {last.mean():.1f} | "
            f"{(last - first).mean():+.1f} |"
        )
    draw(found, args.out / "objectives.png")
    (args.out / "objectives.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
