"""The same run by TRL and by grpo_jax, called by TRL's names: rewards of both in one picture.

    python benchmarks/beside_trl.py --model DIR --out docs/pictures/beside_trl.png

One script's lines, but for the import, run in a process for each trainer and seed: the same model,
prompts, reward, arguments. Random numbers differ, so that curves agree only as runs of several
seeds do. A small model that writes stories is rewarded for short words. `--json FILE` writes the
rewards. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS = [
    "Once upon a time, there was a",
    "One day, a little girl named Lily",
    "Tom and his dog went to the",
    "The sun was hot and the",
    "A big bear lived in",
    "Mom said to her son that",
    "There was a small boat on",
    "Ben had a new toy and",
]
TRAINERS = {"TRL": "trl", "grpo_jax": "grpo_jax.trl"}


def short_words(completions: list[str], **columns: object) -> list[float]:
    """Minus the mean number of letters of a completion's words; of none -10."""
    return [-_mean(map(len, text.split())) for text in completions]


def _mean(numbers) -> float:
    numbers = list(numbers)
    return statistics.fmean(numbers) if numbers else 10.0


def train(module: str, model: str, steps: int, seed: int, folder: str) -> list[float]:
    """The mean reward of each step; the lines that a user of TRL writes."""
    import datasets

    trl = importlib.import_module(module)
    args = trl.GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    trainer = trl.GRPOTrainer(model, short_words, args=args, train_dataset=data)
    run = trainer.train()
    if module == "trl":
        return [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return [row["reward"] for row in run.metrics]


def _run(name: str, args: argparse.Namespace, seed: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rewards.json"
        own = [__file__, "--model", args.model, "--steps", str(args.steps), "--one", name]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *own, "--seed", str(seed), "--json", str(out)],
            check=True,
            cwd=folder,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        )
        rewards = json.loads(out.read_text())
    print(f"{name}, seed {seed}: {rewards[0]:.3f} -> {rewards[-1]:.3f} in "
          f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    return rewards


def draw(found: dict[str, list[list[float]]], out: Path) -> None:
    """Each seed faint, the mean of a trainer's seeds strong."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, runs), color in zip(found.items(), ("#d1603d", "#2f6fb0")):
        steps = range(1, len(runs[0]) + 1)
        for rewards in runs:
            axes.plot(steps, rewards, color=color, alpha=0.25, linewidth=1)
        mean = [statistics.fmean(values) for values in zip(*runs)]
        axes.plot(steps, mean, color=color, linewidth=2, label=f"{name}, mean of {len(runs)} seeds")
    axes.set(xlabel="step", ylabel="mean reward of a step", title="The same script, two trainers")
    axes.grid(color="#e3e6ea")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a small model")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a picture")
    parser.add_argument("--json", type=Path, help="the rewards of each step, by trainer and seed")
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            found = train(TRAINERS[args.one], args.model, args.steps, args.seed, folder)
        args.json.write_text(json.dumps(found))
        return
    found = {name: [] for name in TRAINERS}
    for seed in range(args.seeds):
        for name in TRAINERS:
            found[name].append(_run(name, args, seed))
    for name, runs in found.items():
        ends = [statistics.fmean(rewards[-3:]) for rewards in runs]
        first, last = statistics.fmean(r[0] for r in runs), statistics.fmean(ends)
        spread = f"{min(ends):.3f} to {max(ends):.3f}"
        print(f"{name}: {first:.3f} in the first step, {last:.3f} in the last three ({spread})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.out:
        draw(found, args.out)


if __name__ == "__main__":
    main()
