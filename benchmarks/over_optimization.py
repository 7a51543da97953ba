"""GRPO against one reward model, the mean of three, and the mean less their deviation, offline.

    python benchmarks/over_optimization.py --model DIR --out FOLDER [--seeds 0 1 2] [--steps 30]

Stories of DIR, a small model such as stories260K, are labelled in pairs by a rule that no model is
shown, as in pipeline.py. Three reward models learn, each from its own draw of the pairs, with
repetition. GRPO then trains against the first of them ("alone"), against the mean of the three, and
against the mean less k times their deviation (Coste et al. 2023, arXiv:2310.02743), without a KL
term. Each run is evaluated on held-out beginnings at several of its checkpoints: what it was
trained on (the proxy), the rule (the true reward), and the divergence from the first model. It
prints a table, and draws FOLDER/over_optimization.png. What is in FOLDER is kept.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pipeline

MEMBERS = ("a", "b", "c")
K = 1.0  # deviations that are taken from the mean
ENSEMBLES = {
    "alone": "ensemble:sum(of=['a'], weights=[1.0])",
    "mean of three": f"ensemble:sum(of=['a', 'b', 'c'], weights={[1 / 3] * 3})",
    "mean - deviation": f"ensemble:lower(of=['a', 'b', 'c'], k={K})",
}
PROXIES = {  # of the members' scores [members, rows]
    "alone": lambda score: score[0],
    "mean of three": lambda score: score.mean(0),
    "mean - deviation": lambda score: score.mean(0) - K * score.std(0),
}


def member(out: Path, model: Path, seed: int, name: str) -> Path:
    """A reward model from its own draw of the pairs."""
    folder = out / name
    folder.mkdir(exist_ok=True)
    files = pipeline.labelled_pairs(out, model, seed)
    if not (folder / "pairs.jsonl").exists():
        rows = files[0].read_text().splitlines(keepends=True)
        drawn = np.random.default_rng([seed, 3, ord(name)]).integers(0, len(rows), len(rows))
        (folder / "held_out_pairs.jsonl").write_text(files[1].read_text())
        (folder / "pairs.jsonl").write_text("".join(rows[i] for i in drawn))
    return pipeline.reward_model(folder, model, 10 * seed + ord(name) - ord("a"))


def of_seed(out: Path, model: Path, seed: int, steps: int) -> dict[str, Any]:
    """All that is found for a seed; what was found before is read."""
    out = out / f"seed-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    file = out / "found.json"
    if file.exists():
        return json.loads(file.read_text())
    judges = {name: member(out, model, seed, name) for name in MEMBERS}
    names = [f"model:{folder} as {name}" for name, folder in judges.items()]
    found: dict[str, Any] = {"methods": {}}
    for method, ensemble in ENSEMBLES.items():
        pipeline.online(
            out, model, judges["a"], seed, steps, method.replace(" ", "_"),
            **{
                "rewards.names": [*names, f"{ensemble} as judged", "true_rule:rule"],
                "rewards.weights": [0.0] * len(names) + [1.0, 0.0],
            },
        )  # fmt: skip

    from grpo_jax.devices import sharding
    from grpo_jax.setup import reward_models

    mesh, now = sharding.make_mesh(), datetime.now()
    loaded = [reward_models.load(str(j), mesh, "float32", now) for j in judges.values()]
    for method, proxy in PROXIES.items():
        folder = out / method.replace(" ", "_")
        paths = [str(model), *(f"{folder}@{n}" for n in pipeline.saved_steps(folder))]

        def score(*asked, proxy=proxy):
            return proxy(np.stack([one.score(*asked) for one in loaded]))

        found["methods"][method] = pipeline.evaluated(
            model, SimpleNamespace(score=score), paths, seed
        )
    right = [pipeline.last_metric(out / n / "reward_model", "reward_model/eval_accuracy")
             for n in MEMBERS]  # fmt: skip
    found["held_out_pairs"] = right
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def table(found: dict[int, dict[str, Any]]) -> str:
    """Means over seeds, and the range in brackets."""
    lines = [
        "| trained on | its score, last | true reward, best | true reward, last | fell by | nats |"
    ]
    lines.append("| --- " * 6 + "|")

    def mean(values: list[float]) -> str:
        return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    for method in ENSEMBLES:
        rows = [f["methods"][method] for f in found.values()]
        best = [max(x["true"] for x in row) for row in rows]
        last = [row[-1]["true"] for row in rows]
        lines.append(
            f"| {method} | {mean([row[-1]['proxy'] for row in rows])} | {mean(best)} | "
            f"{mean(last)} | {mean([b - e for b, e in zip(best, last)])} | "
            f"{mean([row[-1]['kl'] for row in rows])} |"
        )
    right = [[round(x, 3) for x in f["held_out_pairs"]] for f in found.values()]
    lines += ["", f"Held-out pairs that each reward model ranks right, by seed: {right}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30, help="of GRPO")
    args = parser.parse_args()
    out = args.out.resolve()
    found = {s: of_seed(out, args.model.resolve(), s, args.steps) for s in args.seeds}
    pipeline.picture(found, out / "over_optimization.png", "what it was trained on")
    print(table(found))


if __name__ == "__main__":
    main()
