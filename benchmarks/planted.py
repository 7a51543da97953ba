"""Runs of the quickstart with a planted cause each, and what their metrics look like.

    python benchmarks/planted.py [--workdir DIR] [NAME ...]

makes the quickstart's first model once (`grpo_jax.sft`), trains it 40 steps by GRPO without and
with each cause, and draws docs/pictures/NAME.png for docs/reading_a_run.md; then prints at which
step each guard first spoke. About a minute a run on two CPU cores. What DIR holds is not run again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CONFIG, STEPS = "configs/quickstart.py", 40
OUT = Path("docs/pictures")


# --- Rewards that are at fault --------------------------------------------------------------------


def constant(completions, **columns):
    """As one that compares with a column that is never right."""
    return [0.0] * len(completions)


def tokens(completions, completion_ids, **columns):
    """More for more tokens, up to the limit."""
    return [min(len(ids) / 40, 1.0) for ids in completion_ids]


def fragile(completions, answer, **columns):
    """Right answers, from a parser that fails where there is working."""
    return [float(c.replace("#### ", "") == a) if int(c.split()[1]) >= 0 else 0.0
            for c, a in zip(completions, answer)]  # fmt: skip


# --- Causes ---------------------------------------------------------------------------------------


class Cause(NamedTuple):
    title: str
    options: tuple[str, ...]
    metrics: tuple[str, ...]  # that show it


def rewards(*names: str) -> tuple[str, str]:
    weights = (1.0, 0.1)[: len(names)]
    return f"rewards.names={list(names)!r}", f"rewards.weights={list(weights)!r}"


HEALTHY = "healthy"
CAUSES = {
    HEALTHY: Cause("Nothing planted", (), ("reward", "policy/loss", "policy/entropy")),
    "learning_rate": Cause(
        "Learning rate a hundred times too high",
        ("optim.learning_rate=2e-2",),
        ("policy/kl", "policy/entropy", "policy/grad_norm"),
    ),
    "format": Cause(
        "A format that the model does not know",
        rewards("exact_answer", "think_answer_format"),
        ("reward/think_answer_format", "reward/exact_answer", "groups/equal_share"),
    ),
    "truncation": Cause(
        "Completions of at most 12 tokens",
        ("rollout.max_tokens=12",),
        ("completion/truncated_share", "completion/length", "accuracy"),
    ),
    "constant": Cause(
        "A reward that is always the same",
        rewards("benchmarks.planted:constant"),
        ("groups/equal_share", "reward_std", "policy/grad_norm"),
    ),
    "length": Cause(
        "A reward for many tokens, and no KL",
        (*rewards("benchmarks.planted:tokens"), "algorithm.kl_coef=0"),
        ("reward", "completion/length", "completion/truncated_share"),
    ),
    "failing": Cause(
        "A reward function that fails where there is working",
        (*rewards("benchmarks.planted:fragile"), "rewards.on_failure=least"),
        ("rewards/failed/fragile", "reward", "completion/length"),
    ),
}


def run(name: str, root: Path, model: Path) -> Path:
    """The folder of the run with that cause; it goes on with one that is there."""
    folder = root / name
    options = [
        f"model.path={model}", "sft.num_steps=0", f"loop.num_steps={STEPS}",
        "evaluation.num_problems=0", "checkpoint.every_steps=0", "checkpoint.export=False",
        "logging.tensorboard=False", "optim.schedule=constant",
        "guards.window=5", "guards.entropy_min=0.005", "guards.entropy_max=1.5",
        *(() if name == "length" else ("guards.kl_max=0.5",)),
        "rewards.max_failed_share=0.1", "guards.failed_rewards=warn", *CAUSES[name].options,
    ]  # fmt: skip
    program("train", folder, *options)
    return folder


def program(module: str, folder: Path, *options: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"grpo_jax.{module}", "--config", CONFIG]
    command += ["--workdir", str(folder), *(f"--config.{option}" for option in options)]
    with folder.with_suffix(".log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def spoke(folder: Path) -> list[str]:
    """The first warning of each guard of a run."""
    first: dict[str, str] = {}
    for line in folder.with_suffix(".log").read_text().splitlines():
        if guard := re.search(r"^warning: Step \d+.*\((guards\.\w+) = ", line):
            first.setdefault(guard[1], line)
    return list(first.values())


# --- Pictures -------------------------------------------------------------------------------------


def draw(name: str, root: Path) -> Path:
    """The cause's metrics beside those of the run without it."""
    from matplotlib.figure import Figure

    from grpo_jax.run.append_log import read_jsonl

    cause, names = CAUSES[name], [HEALTHY] if name == HEALTHY else [HEALTHY, name]
    figure = Figure(figsize=(9, 2.3), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(cause.title, fontsize=10, x=0.01, ha="left", fontweight="bold")
    for ax, metric in zip(figure.subplots(1, len(cause.metrics)), cause.metrics):
        for shown, color in zip(names, ("#8b929c", "#d1603d")):
            rows = [
                r for r in read_jsonl(root / shown / "metrics.jsonl") if r.get(metric) is not None
            ]
            label = shown if shown == HEALTHY else "planted"
            ax.plot([r["step"] for r in rows], [r[metric] for r in rows], color=color, label=label)
        ax.set_title(metric, fontsize=9, loc="left")
        ax.tick_params(labelsize=8, length=0)
        ax.grid(color="#e3e6ea", linewidth=0.8)
        for side in ax.spines.values():
            side.set_color("#e3e6ea")
    ax.legend(fontsize=8, frameon=False)
    OUT.mkdir(exist_ok=True)
    file = OUT / f"{name}.png"
    figure.savefig(file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/planted"), metavar="DIR")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CAUSES)}; without any, all")
    args = parser.parse_args()
    bootstrap = args.workdir / "bootstrap"
    program("sft", bootstrap)
    for name in dict.fromkeys([HEALTHY, *(args.names or CAUSES)]):
        folder = run(name, args.workdir, bootstrap / "export")
        print(draw(name, args.workdir), *spoke(folder), sep="\n", flush=True)


if __name__ == "__main__":
    main()
