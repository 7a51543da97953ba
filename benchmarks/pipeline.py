"""From a pretrained model over a reward model to GRPO, PPO, DPO and KTO against it, offline.

    python benchmarks/pipeline.py --model DIR --out FOLDER [--seeds 0 1 2]

DIR is a small model that tells stories, such as stories260K. Its stories are labelled in pairs by
a rule that no model is shown: the number of different friendly words less that of unfriendly ones.
A reward model learns from the pairs. GRPO and PPO then draw completions and train against it; DPO
and KTO train on as many tokens of the first model's completions, labelled by it. Every method is
evaluated on held-out beginnings at several of its checkpoints: the reward model's score (the
proxy), the rule's (the true reward), and the divergence from the first model.

Where the proxy rises and the true reward falls, the reward model is over-optimized (Gao et al.
2022, arXiv:2210.10760). It prints a table, and draws FOLDER/pipeline.png. What is in FOLDER is
kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("grpo", "ppo", "dpo", "kto")
GOOD = frozenset(
    "happy happily smile smiled love loved hug hugged kind friend friends fun laugh laughed share "
    "shared help helped nice good best thank proud play played beautiful".split()
)
BAD = frozenset("sad cry cried angry scared mean bad hurt afraid mad fight lost dark".split())
TOKENS = 64  # of a completion
PROMPTS, GROUP = 16, 8  # of a step
POINTS = 5  # checkpoints that are evaluated


def true_reward(text: str) -> float:
    """Different friendly words less different unfriendly ones."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return float(len(words & GOOD) - len(words & BAD))


RULE = """
from pipeline import true_reward

def rule(completions, **columns):
    return [true_reward(text) for text in completions]
"""


def run(folder: Path, program: str, ends: str, options: dict[str, object]) -> float:
    """Runs a program once; its seconds. `ends`: what it leaves when it ends well."""
    told = folder / "seconds.json"
    if not (folder / ends).exists() or not told.exists():
        arguments = [f"--config.{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", f"grpo_jax.{program}", "--config", "stories"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(folder.parent), str(Path(__file__).parent), str(Path(__file__).parents[1])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        began = time.monotonic()
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            command += ["--workdir", str(folder), *arguments]
            subprocess.run(command, check=True, stdout=log, stderr=log, env=env)
        told.write_text(json.dumps(time.monotonic() - began))
    return json.loads(told.read_text())


def common(seed: int, model: Path, steps: int, section: str) -> dict[str, object]:
    return {
        "seed": seed,
        "model.path": model,
        "evaluation.every_steps": 0,
        "evaluation.num_problems": 0,
        "logging.samples_every_steps": 0,
        f"{section}.num_steps": steps,
    }


# --- Data -----------------------------------------------------------------------------------------


def beginnings(seed: int) -> tuple[list[str], list[str]]:
    """Beginnings to draw pairs from, and held-out ones."""
    from grpo_jax.data.tasks import stories

    train, held_out = stories.generate(1024, 64, seed)
    return [p.prompt for p in train], [p.prompt for p in held_out]


def draw(model: Path, prompts: list[str], number: int, seed: int) -> list[list[str]]:
    """Completions of each prompt."""
    import grpo_jax

    told = grpo_jax.load(model)
    found = told.generate(
        prompts, max_tokens=TOKENS, num_samples=number, temperature=1.0, seed=seed
    )
    return [list(each.texts) for each in found]


def labelled_pairs(out: Path, model: Path, seed: int) -> tuple[Path, Path]:
    """Files of pairs that the rule has labelled, with noise: to train on, and held out."""
    files = out / "pairs.jsonl", out / "held_out_pairs.jsonl"
    if all(file.exists() for file in files):
        return files
    prompts, held_out = beginnings(seed)
    rng = np.random.default_rng([seed, 1])
    for file, asked in zip(files, (prompts, held_out)):
        rows = []
        for prompt, texts in zip(asked, draw(model, asked, 4, seed + 100)):
            for one, two in ((texts[0], texts[1]), (texts[2], texts[3])):
                more = true_reward(one) - true_reward(two)
                if more:
                    is_first = rng.random() < 1 / (1 + np.exp(-2 * more))
                    chosen, rejected = (one, two) if is_first else (two, one)
                    rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def labelled_by_model(out: Path, model: Path, judge: Path, seed: int, tokens: float) -> dict:
    """Files of the first model's completions, about so many tokens, labelled by a reward model."""
    files = {"dpo": out / "dpo.jsonl", "kto": out / "kto.jsonl"}
    if all(file.exists() for file in files.values()):
        return files
    from grpo_jax.devices import sharding
    from grpo_jax.setup import reward_models

    prompts, _ = beginnings(seed)
    number = max(2, 2 * round(tokens / TOKENS / len(prompts) / 2))
    texts = draw(model, prompts, number, seed + 200)
    judge = reward_models.load(str(judge), sharding.make_mesh(), "float32", datetime.now())
    every = [text for own in texts for text in own]
    score = judge.score(prompts, every, number).reshape(len(prompts), number)
    pairs, single, middle = [], [], float(np.median(score))
    for prompt, own, values in zip(prompts, texts, score):
        order = np.argsort(-values)
        for best, worst in zip(order[: number // 2], order[::-1]):
            pairs.append({"prompt": prompt, "chosen": own[best], "rejected": own[worst]})
        for text, value in zip(own, values):
            single.append({"prompt": prompt, "completion": text, "label": bool(value > middle)})
    files["dpo"].write_text("".join(json.dumps(row) + "\n" for row in pairs))
    files["kto"].write_text("".join(json.dumps(row) + "\n" for row in single))
    return files


# --- Training -------------------------------------------------------------------------------------


def reward_model(out: Path, model: Path, seed: int) -> Path:
    train, held_out = labelled_pairs(out, model, seed)
    rows = len(train.read_text().splitlines())
    options = common(seed, model, 3 * rows // 32, "reward_model") | {
        "data.task": "",
        "data.path": train,
        "data.eval_path": held_out,
        "reward_model.batch": 32,
        "reward_model.max_tokens": TOKENS + 16,
        "reward_model.learning_rate": 1e-3,
        "reward_model.warmup_steps": 10,
        "reward_model.centre_coef": 0.01,
        "evaluation.num_problems": 64,
    }
    run(out / "reward_model", "reward_model", "export/config.json", options)
    return out / "reward_model" / "export"


def online(
    out: Path, model: Path, judge: Path, seed: int, steps: int, method: str, **more: object
) -> float:
    """Trains against a reward model, or against the rewards that `more` names; its seconds."""
    (out / "true_rule.py").write_text(RULE)
    options = common(seed, model, steps, "loop") | {
        "rewards.names": f"['model:{judge}', 'true_rule:rule']",
        "rewards.weights": "[1.0, 0.0]",
        "batch.prompts": PROMPTS,
        "batch.group": GROUP,
        "batch.minibatches": 2,
        "rollout.max_tokens": TOKENS,
        "algorithm.kl_coef": 0.0,
        "optim.learning_rate": 3e-4,
        "checkpoint.every_steps": steps // POINTS,
        "checkpoint.keep": POINTS,
    }
    if method == "ppo":
        options |= {
            "algorithm.preset": "ppo",
            "critic.path": judge,
            "critic.learning_rate": 1e-3,
            "critic.first_steps": 2,
        }
    return run(out / method, "train", "export/config.json", options | more)


def offline(out: Path, model: Path, data: Path, seed: int, method: str) -> float:
    batch = 64
    steps = POINTS * max(1, len(data.read_text().splitlines()) // batch // POINTS)
    options = common(seed, model, steps, "preference") | {
        "data.task": "",
        "data.path": data,
        "preference.loss": "sigmoid" if method == "dpo" else "kto",
        "preference.beta": 0.1,
        "preference.batch": batch,
        "preference.max_tokens": TOKENS + 16,  # a text may be read as other tokens
        "preference.learning_rate": 5e-4,
        "preference.warmup_steps": 5,
        "preference.checkpoint_every_steps": steps // POINTS,
        "checkpoint.keep": POINTS,
    }
    return run(out / method, "dpo", "export/config.json", options)


# --- Evaluation -----------------------------------------------------------------------------------


def evaluated(first: Path, judge: Any, paths: list[str], seed: int) -> list[dict[str, float]]:
    """Of each model: mean proxy, mean true reward, nats from the first model for a completion."""
    import jax
    import jax.numpy as jnp

    from grpo_jax import generate, keys
    from grpo_jax.algorithm.advantages import AdvantageOptions
    from grpo_jax.data.problems import Problem
    from grpo_jax.devices import sharding, transfer
    from grpo_jax.learner.experience import make_prepare
    from grpo_jax.learner.scoring import Scorer
    from grpo_jax.models.policy import load_params
    from grpo_jax.models.policy import read as read_policy
    from grpo_jax.structs import Sampling

    mesh, (_, prompts) = sharding.make_mesh(), beginnings(seed)
    policy, sampling, number = read_policy(str(first)), Sampling(), 8
    reference = load_params(policy, mesh, 0, jnp.float32)
    problems = [Problem(prompt, {}, "a beginning") for prompt in prompts]
    ids = [generate.encode_prompt(policy, problem, TOKENS) for problem in problems]
    engine = generate.engine_of(policy, mesh, sampling, TOKENS, jnp.float32)
    scorer = Scorer(policy.model, mesh, sampling, jnp.float32)
    options = AdvantageOptions(scale_by="none")
    prepare = make_prepare(scorer, options, mask_truncated=False, with_old=True)
    found = []
    for path in paths:
        params = generate.load_params(generate.find_model(path), mesh, jnp.float32)
        drawn = engine.generate(
            engine.publish(params), ids, group=number, key=keys.key_for(seed, "evaluate"),
            temperature=1.0,
        )  # fmt: skip
        placed = transfer.shard_rows(mesh, (drawn, np.zeros(drawn.length_PG.shape, np.float32)))
        log_probs = prepare.log_probs(params, reference, placed[0])
        done = jax.device_get(prepare(log_probs, placed[1]))
        more = np.where(done.action_PGC, done.old_logp_PGC - done.ref_logp_PGC, 0)
        texts = [text for each in generate.completions(policy, ids, drawn) for text in each.texts]
        found.append(
            {
                "proxy": float(judge.score(prompts, texts, number).mean()),
                "true": float(np.mean([true_reward(text) for text in texts])),
                "kl": float(more.sum() / len(texts)),
            }
        )
    return found


def of_seed(out: Path, model: Path, seed: int, steps: int) -> dict[str, Any]:
    """All that is found for a seed; what was found before is read."""
    out = out / f"seed-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    file = out / "found.json"
    if file.exists():
        return json.loads(file.read_text())
    began = time.monotonic()
    judge = reward_model(out, model, seed)
    seconds = {m: online(out, model, judge, seed, steps, m) for m in ("grpo", "ppo")}
    tokens = steps * PROMPTS * GROUP * TOKENS
    data = labelled_by_model(out, model, judge, seed, tokens)
    seconds |= {m: offline(out, model, data[m], seed, m) for m in ("dpo", "kto")}

    from grpo_jax.devices import sharding
    from grpo_jax.setup import reward_models

    loaded = reward_models.load(str(judge), sharding.make_mesh(), "float32", datetime.now())
    points = {m: saved_steps(out / m) for m in METHODS}
    paths = [str(model), *(f"{out / m}@{n}" for m in METHODS for n in points[m])]
    rows = evaluated(model, loaded, paths, seed)
    before, rest = rows[0], iter(rows[1:])
    of_method = {m: [before, *(next(rest) for _ in points[m])] for m in METHODS}
    pairs = last_metric(out / "reward_model", "reward_model/eval_accuracy")
    found = {
        "methods": of_method,
        "seconds": seconds,
        "step_s": {m: step_seconds(out / m) for m in ("grpo", "ppo")},
        "held_out_pairs": pairs,
        "minutes": (time.monotonic() - began) / 60,
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def saved_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints, evenly spaced."""
    from grpo_jax.run.append_log import read_jsonl

    last = max(int(row["step"]) for row in read_jsonl(folder / "metrics.jsonl"))
    return [last * (i + 1) // POINTS for i in range(POINTS)]


def metrics(folder: Path) -> list[dict[str, float]]:
    from grpo_jax.run.append_log import read_jsonl

    return list(read_jsonl(folder / "metrics.jsonl"))


def last_metric(folder: Path, name: str) -> float | None:
    values = [row[name] for row in metrics(folder) if name in row]
    return values[-1] if values else None


def step_seconds(folder: Path) -> float:
    """The median seconds of a step, without those in which a program was compiled first."""
    values = [row["time/step_s"] for row in metrics(folder) if "time/step_s" in row]
    return float(np.median(values[len(values) // 4 :])) if values else float("nan")


def table(found: dict[int, dict[str, Any]]) -> str:
    lines = ["| method | seeds | proxy | true reward, best | true reward, last | nats, last |"]
    lines.append("| --- " * 6 + "|")
    for method in ("before", *METHODS):
        rows = [f["methods"]["grpo" if method == "before" else method] for f in found.values()]
        rows = [row[:1] if method == "before" else row for row in rows]
        mean = lambda values: f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"  # noqa: E731
        lines.append(
            f"| {method} | {len(rows)} | {mean([r[-1]['proxy'] for r in rows])} | "
            f"{mean([max(x['true'] for x in r) for r in rows])} | "
            f"{mean([r[-1]['true'] for r in rows])} | {mean([r[-1]['kl'] for r in rows])} |"
        )
    each = list(found.values())
    lines += ["", f"Held-out pairs that the reward model ranks right: "
              f"{[round(f['held_out_pairs'] or float('nan'), 3) for f in each]}"]  # fmt: skip
    ratio = [f["step_s"]["ppo"] / f["step_s"]["grpo"] for f in each]
    lines.append(f"Seconds of a step, PPO over GRPO: {[round(r, 2) for r in ratio]}")
    lines.append(f"Minutes of a seed: {[round(f['minutes'], 1) for f in each]}")
    return "\n".join(lines)


def picture(found: dict[int, dict[str, Any]], file: Path, proxy: str = "reward model") -> None:
    """Proxy and true reward over the divergence, a line for each seed and method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from grpo_jax.metrics.curves import COLORS

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharex=True)
    for axis, kind, title in zip(axes, ("proxy", "true"), (proxy, "true reward")):
        for i, method in enumerate(next(iter(found.values()))["methods"]):
            for n, of in enumerate(found.values()):
                rows = of["methods"][method]
                x, y = [r["kl"] for r in rows], [r[kind] for r in rows]
                label = method.upper() if method in METHODS else method
                axis.plot(x, y, "o-", ms=3, color=COLORS[i], label=None if n else label)
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set_xlim(left=0)
        axis.set_xlabel("nats from the first model, of a completion")
        axis.set_title(title)
        axis.grid(color="#e3e6ea")
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30, help="of GRPO and PPO")
    args = parser.parse_args()
    out = args.out.resolve()
    found = {s: of_seed(out, args.model.resolve(), s, args.steps) for s in args.seeds}
    picture(found, out / "pipeline.png")
    print(table(found))


if __name__ == "__main__":
    main()
