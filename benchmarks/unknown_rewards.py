"""Whether rewards that fail harm learning: the quickstart with 30 % of them failing, by kind.

    python benchmarks/unknown_rewards.py --out FOLDER [--seeds 0 1 2] [--steps 30]

Every seed has one model from supervised training, from which four runs start: "none", in which no
reward fails; "unknown", in which 30 % fail and are left out; "least", in which they count as bad
answers; and "none-again" with other draws, whose distance from "none" is the spread to compare
with. Which rewards fail follows from the completion's text and the step, so it does not depend on
whether the answer is right. What is there in FOLDER is not run again. It prints a table of held-out
accuracy by seed, and of the mean training reward of the second half; and writes
FOLDER/unknown_rewards.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from grpo_jax.rewards.exact import exact_answer
from grpo_jax.run.append_log import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.py"
SHARE = 0.3
FAILING = "benchmarks.unknown_rewards:failing"
RUNS = {
    "none": {"rewards.names": ("exact_answer",)},
    "none-again": {"rewards.names": ("exact_answer",)},
    "unknown": {"rewards.names": (FAILING,), "rewards.on_failure": "unknown"},
    "least": {"rewards.names": (FAILING,), "rewards.on_failure": "least"},
}


def failing(prompts, completions, answer, trainer_state, **columns):
    """`exact_answer`, but a value that is no number for 30 % of the completions of training."""
    given = exact_answer(prompts=prompts, completions=completions, answer=answer)
    if not trainer_state.max_steps:  # an evaluation
        return given
    step = trainer_state.global_step
    keys = (zlib.crc32(f"{step} {p} {c}".encode()) % 1000 for p, c in zip(prompts, completions))
    return [float("nan") if key < 1000 * SHARE else r for key, r in zip(keys, given)]


failing.right_or_wrong = True


def run(folder: Path, program: str, **options: object) -> list[dict]:
    """The metrics of a run of the config with other options, made once."""
    if not (folder / "summary.json").is_file() and not (folder / "export").is_dir():
        command = [sys.executable, "-m", f"grpo_jax.{program}", "--config", str(CONFIG)]
        command += ["--workdir", str(folder), *(f"--config.{k}={v}" for k, v in options.items())]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=ROOT)
    return list(read_jsonl(folder / "metrics.jsonl"))


def trained(out: Path, name: str, seed: int, steps: int) -> list[dict]:
    """The metrics of one of RUNS, from the start of its seed."""
    start = out / f"start-{seed}"
    run(start, "sft", **{"seed": seed, "evaluation.num_problems": 0})
    options = {
        "seed": seed + 1000 * (name == "none-again"),  # of draws: the model is that of its seed
        "model.path": start / "export",
        "sft.num_steps": 0,
        "loop.num_steps": steps,
        "evaluation.num_samples": 0,
        "rewards.weights": (1.0,),
        "rewards.max_failed_share": 0.6,
        "checkpoint.export": False,
        "logging.tensorboard": False,
        **RUNS[name],
    }
    return run(out / f"{name}-{seed}", "train", **options)


def figures(rows: list[dict]) -> dict[str, float]:
    """Held-out accuracy at the end, the mean training reward of the second half, and failures."""
    steps = [row for row in rows if "reward" in row]
    late = steps[len(steps) // 2 :]
    return {
        "accuracy": [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1],
        "reward": float(np.mean([row["reward"] for row in late])),
        "unknown": float(np.mean([row["rewards/unknown_share"] for row in steps])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    out = args.out.resolve()
    found = {
        name: {s: figures(trained(out, name, s, args.steps)) for s in args.seeds} for name in RUNS
    }
    (out / "unknown_rewards.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"| run | {' | '.join(f'seed {s}' for s in args.seeds)} | mean | reward | unknown |")
    print("| --- " * (len(args.seeds) + 4) + "|")
    for name, by_seed in found.items():
        accuracies = [by_seed[s]["accuracy"] for s in args.seeds]
        told = " | ".join(f"{100 * a:.1f} %" for a in [*accuracies, np.mean(accuracies)])
        mean = {k: np.mean([by_seed[s][k] for s in args.seeds]) for k in ("reward", "unknown")}
        print(f"| {name} | {told} | {mean['reward']:.3f} | {100 * mean['unknown']:.0f} % |")
    first, again, unknown = (
        np.array([found[n][s]["accuracy"] for s in args.seeds])
        for n in ("none", "none-again", "unknown")
    )
    low, high = np.minimum(first, again).min(), np.maximum(first, again).max()
    spread = f"{100 * low:.1f} to {100 * high:.1f} %"
    inside = "within" if low <= unknown.mean() <= high else "outside of"
    print(f"\nThe mean with failures, {100 * unknown.mean():.1f} %, is {inside} the spread of the "
          f"runs without, {spread}.")  # fmt: skip


if __name__ == "__main__":
    main()
