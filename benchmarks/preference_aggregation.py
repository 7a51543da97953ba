"""What a policy converges to under each KL term: by formula, by enumeration, and by training.

    python benchmarks/preference_aggregation.py enumerate
    python benchmarks/preference_aggregation.py train [--workdir DIR] [--steps N] [KL ...]
    python benchmarks/preference_aggregation.py write

One prompt, answers of one token. `enumerate` finds where the expected gradient of the trainer's own
advantages and losses is zero, over all groups of answers in float64, and compares that with the
formulas; a minute. `train` trains a tiny model with the trainer, three seeds for each KL term, and
keeps the shares of right answers in docs/preference_aggregation.json; about 15 s of a processor a
run. `write` draws docs/pictures/preference_aggregation.png and writes the tables of
docs/preference_aggregation.md.

    K answers    Q, q the reference    p the probability of the better of two answers
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from grpo_jax.algorithm import advantages, losses

DOCS = Path(__file__).resolve().parents[1] / "docs"
RUNS = DOCS / "preference_aggregation.json"
# The KL terms: options of `algorithm`, and what a page calls them.
KL_TERMS = {
    "k3": {"kl_estimator": "k3"},
    "k2": {"kl_estimator": "k2"},
    "k3_ratio": {"kl_estimator": "k3_ratio"},
    "reward": {"kl_in": "reward"},
}
TITLES = {
    "k3": "k3 in the loss",
    "k2": "k2 in the loss",
    "k3_ratio": "k3 times ratio in the loss",
    "reward": "k1 in the reward",
}


class Setting(NamedTuple):
    """One prompt: its answers, the reference, and how a policy is trained on it."""

    kl: str  # of KL_TERMS
    beta: float  # algorithm.kl_coef
    group: float = 8  # G; infinite only by formula
    scale_by: str = "std"
    baseline: str = "mean"
    reward_K: tuple[float, ...] = (1.0, 0.0)
    reference_K: tuple[float, ...] = (0.3, 0.7)


# --- By formula -----------------------------------------------------------------------------------


def advantage_by_formula(setting: Setting, policy_K: np.ndarray) -> np.ndarray:
    """Expected advantage of each answer beside G - 1 others that the policy draws, [K].

    Divided by a deviation, for two answers of any rewards, or for a group of two.
    """
    reward_K, group = np.array(setting.reward_K), setting.group
    if setting.scale_by == "none":
        kept = 1 - 1 / group if setting.baseline == "mean" else 1
        return kept * (reward_K - policy_K @ reward_K)
    sample = math.sqrt(1 - 1 / group) if setting.scale_by == "sample_std" else 1
    if group == 2:  # two different rewards have the advantages 1 and -1
        return sample * np.sign(reward_K[:, None] - reward_K[None]) @ policy_K
    p, rest = policy_K
    spread = math.sqrt(p * rest)  # the deviation of all answers, and below its mean over groups
    if group < math.inf:
        m = np.arange(group + 1)
        share = special.binom(group, m) * p**m * rest ** (group - m)
        spread = share @ np.sqrt(m * (group - m)) / group
    return sample * spread * np.array([1 / p, -1 / rest])


def gradient_by_formula(setting: Setting, logits_K: np.ndarray) -> np.ndarray:
    """Expected gradient of what is maximized, in the logits of the answers, [K]."""
    policy_K, q_K = special.softmax(logits_K), np.array(setting.reference_K)
    above_K = special.log_softmax(logits_K) - np.log(q_K)
    if setting.kl == "reward":  # without its scale, which is positive
        worth_K = setting.reward_K - setting.beta * above_K
        return policy_K * (worth_K - policy_K @ worth_K)
    advantage_K = advantage_by_formula(setting, policy_K)
    if setting.kl == "k3":
        return policy_K * advantage_K + setting.beta * (q_K - policy_K)
    return policy_K * (advantage_K - setting.beta * (above_K - policy_K @ above_K))


def limit(
    gradient: Callable[[np.ndarray], np.ndarray],
    reference_K: tuple[float, ...],
    step: float = 0.25,
) -> np.ndarray:
    """The policy that ascent along `gradient` from the reference ends at, [K].

    The first of two answers is the better one, and the limit its first zero above the reference,
    looked for in steps of so many nats of log-odds; (1, 0) if there is none below 40 nats. More
    answers need a gradient with one zero.
    """
    if len(reference_K) == 2:
        rise = lambda odds: -gradient(np.array([odds, 0.0]))[1]  # noqa: E731
        low = math.log(reference_K[0] / reference_K[1])
        while rise(low + step) > 0:
            low += step
            if low > 40:
                return np.array([1.0, 0.0])
        odds_K = np.array([optimize.brentq(rise, low, low + step, xtol=1e-10), 0.0])
    else:
        begin = np.log(reference_K[:-1]) - math.log(reference_K[-1])
        found = optimize.root(lambda odds: gradient(np.append(odds, 0.0))[:-1], begin, tol=1e-12)
        if not found.success:
            raise ValueError(f"No limit was found from the reference {reference_K}.")
        odds_K = np.append(found.x, 0.0)
    return special.softmax(odds_K)


def by_formula(setting: Setting) -> np.ndarray:
    return limit(lambda logits_K: gradient_by_formula(setting, logits_K), setting.reference_K)


# --- By enumeration -------------------------------------------------------------------------------


def gradient_by_enumeration(setting: Setting, logits_K: np.ndarray) -> np.ndarray:
    """As `gradient_by_formula`, of the trainer's own advantages and losses, over all K^G groups."""
    count, log_policy_K = len(logits_K), special.log_softmax(logits_K)
    answer_PG = np.array(list(itertools.product(range(count), repeat=int(setting.group))))
    options, every = KL_TERMS[setting.kl], np.ones(answer_PG.shape, bool)
    in_reward = options.get("kl_in") == "reward"
    logp_PG, ref_PG = log_policy_K[answer_PG], np.log(setting.reference_K)[answer_PG]
    adv_PG = advantages.evaluate(
        {
            "scale_by": setting.scale_by,
            "baseline": setting.baseline,
            "kl_in": "reward" if in_reward else "loss",
            "kl_coef": setting.beta,
        },
        np.array(setting.reward_K)[answer_PG][..., None],
        np.ones(1),
        action_PGC=every[..., None],
        logp_PGC=logp_PG[..., None],
        ref_logp_PGC=ref_PG[..., None],
    )
    column = lambda x_PG: x_PG.reshape(-1, 1)  # noqa: E731
    _, slope_B1 = losses.evaluate(
        {"kl_coef": 0.0 if in_reward else setting.beta, **options},
        logp_BT=column(logp_PG),
        ref_logp_BT=column(ref_PG),
        advantage_B=adv_PG.ravel(),
        action_BT=column(every),
    )
    # The loss is a mean over all completions; here each group counts by its probability.
    share_PG = np.exp(logp_PG.sum(axis=1, keepdims=True)) * np.ones(answer_PG.shape) * len(logp_PG)
    rise_K = np.bincount(answer_PG.ravel(), -slope_B1.ravel() * share_PG.ravel(), count)
    return rise_K - np.exp(log_policy_K) * rise_K.sum()


def by_enumeration(setting: Setting) -> np.ndarray:
    gradient = lambda logits_K: gradient_by_enumeration(setting, logits_K)  # noqa: E731
    return limit(gradient, setting.reference_K, step=1.0)


BETAS = (0.5, 1.0, 2.0)
# Rows of the table of two answers: words, and what differs from the usual setting.
TWO_ANSWERS = {
    'k3 in the loss, `"std"`, G = 2': {"kl": "k3", "group": 2},
    'k3 in the loss, `"std"`, G = 8': {"kl": "k3"},
    'k3 in the loss, `"sample_std"`, G = 8': {"kl": "k3", "scale_by": "sample_std"},
    'k3 in the loss, `"std"`, G → ∞': {"kl": "k3", "group": math.inf},
    'k3 in the loss, `"none"`, G = 4': {"kl": "k3", "group": 4, "scale_by": "none"},
    'k2 or k3 × ratio, `"std"`, G = 2': {"kl": "k3_ratio", "group": 2},
    'k2 or k3 × ratio, `"std"`, G = 8': {"kl": "k3_ratio"},
    'k2 or k3 × ratio, `"sample_std"`, G = 8': {"kl": "k2", "scale_by": "sample_std"},
    'k2 or k3 × ratio, `"none"`, G = 4': {"kl": "k2", "group": 4, "scale_by": "none"},
    'k2 or k3 × ratio, leave one out, `"none"`, any G': {
        "kl": "k3_ratio",
        "group": 4,
        "scale_by": "none",
        "baseline": "leave_one_out",
    },
    "k1 in the reward, any scale, any G": {"kl": "reward", "scale_by": "none"},
}
THREE = {"reward_K": (1.0, 0.9, 0.0), "reference_K": (0.2, 0.3, 0.5), "beta": 1.0}
THREE_ANSWERS = {
    'k3 in the loss, `"std"`, G = 2': {"kl": "k3", "group": 2, **THREE},
    'k2 or k3 × ratio, `"std"`, G = 2': {"kl": "k2", "group": 2, **THREE},
    'k3 in the loss, `"none"`, G = 4': {"kl": "k3", "group": 4, "scale_by": "none", **THREE},
    "k1 in the reward, any scale, any G": {
        "kl": "reward",
        "group": 2,
        "scale_by": "none",
        **THREE,
    },
}


def settings() -> dict[str, list[Setting]]:
    """The settings of both tables by row."""
    two = {
        words: [Setting(**given, beta=beta) for beta in BETAS]
        for words, given in TWO_ANSWERS.items()
    }
    return two | {f"three, {w}": [Setting(**given)] for w, given in THREE_ANSWERS.items()}


def enumerable(setting: Setting) -> Setting:
    """The setting with rewards so large that "sample_std", which adds 1e-4, divides by s alone."""
    if setting.scale_by != "sample_std":
        return setting
    return setting._replace(reward_K=tuple(1e6 * r for r in setting.reward_K))


def compare() -> float:
    """Prints the limits by formula and by enumeration; returns the largest difference."""
    worst = 0.0
    for words, row in settings().items():
        for setting in row:
            formula_K = by_formula(setting)
            told = f"{words}, beta {setting.beta}: formula {np.round(formula_K[:-1], 6)}"
            if setting.group < math.inf:
                enumerated_K = by_enumeration(enumerable(setting))
                apart = np.abs(enumerated_K - formula_K).max()
                worst = max(worst, apart)
                told += f", enumeration {np.round(enumerated_K[:-1], 6)}, {apart:.1e} apart"
            print(told, flush=True)
    return worst


# --- By the trainer -------------------------------------------------------------------------------

PROMPTS, WIDTH, TAIL = 32, 32, 200  # the prompt's copies in a step; steps of the mean
WORDS = ("<eos>", "?", "a", "b")


def right(completions, **columns):
    return [float(text.strip() == "a") for text in completions]


def save_reference(folder: Path, reference_K: tuple[float, ...]) -> None:
    """A Llama of one layer that answers "?" with "a" and "b" as the reference does.

    Its layer adds nothing at first, every embedding is 1 and so is its norm: a token's logit is the
    sum of its column of the head.
    """
    import jax
    import jax.numpy as jnp
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from grpo_jax.models import parameters
    from grpo_jax.models.hf import export
    from grpo_jax.structs import Layer, ModelConfig, Rotary

    model = ModelConfig(
        family="llama", vocab_size=len(WORDS), width=WIDTH, mlp_width=WIDTH, layers=(Layer(),),
        num_heads=2, num_kv_heads=2, head_size=WIDTH // 2, rotaries=(Rotary(100.0),), norm_eps=1e-6,
        max_position=16, tied_head=False,
    )  # fmt: skip
    params = parameters.init(model, jax.random.key(0))
    (layer,) = jax.tree.leaves(params["layers"], is_leaf=lambda x: "attention" in x)
    for branch, name in (("attention", "o"), ("mlp", "down")):
        layer[branch][name]["kernel"] = jnp.zeros_like(layer[branch][name]["kernel"])
    params["embed"]["embedding"] = jnp.ones_like(params["embed"]["embedding"])
    logits_V = jnp.array([-30.0, -30.0, *np.log(reference_K)])
    params["head"]["kernel"] = jnp.tile(logits_V / WIDTH, (WIDTH, 1))
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="?",
    )
    export.save(folder, params, model, source=None, dtype="float32", tokenizer=tokenizer)


def train(setting: Setting, seed: int, steps: int, root: Path) -> list[float]:
    """The share of right answers in each step of a run of the trainer."""
    import grpo_jax

    reference = root / "reference"
    if not (reference / "config.json").exists():
        save_reference(reference, setting.reference_K)
    options = {
        "algorithm.kl_coef": setting.beta,
        "algorithm.scale_by": setting.scale_by,
        **{f"algorithm.{name}": value for name, value in KL_TERMS[setting.kl].items()},
        "seed": seed,
        "batch.prompts": PROMPTS,
        "batch.group": int(setting.group),
        "rollout.max_tokens": 1,
        "loop.num_steps": steps,
        "optim.learning_rate": 2e-3,
        "optim.schedule": "linear",
        "optim.end_fraction": 0.02,
        "evaluation.num_problems": 0,
        "checkpoint.every_steps": 0,
        "checkpoint.export": False,
        "logging.tensorboard": False,
        "logging.samples_every_steps": 0,
        "logging.console": "quiet",
        "rewards.num_workers": 1,
    }
    run = grpo_jax.train(
        str(reference), right, [{"prompt": "?"}] * PROMPTS,
        workdir=root / f"{setting.kl}-{seed}-{steps}", **options,
    )  # fmt: skip
    return [row["reward"] for row in run.metrics if "reward" in row]


def train_all(names: list[str], steps: int, root: Path) -> None:
    """Trains with these KL terms and three seeds; adds each limit to the file of runs."""
    for name, seed in itertools.product(names, range(3)):
        setting, began = Setting(name, beta=1.0), time.monotonic()
        shares = train(setting, seed, steps, root)
        found, expected = float(np.mean(shares[-TAIL:])), float(by_formula(setting)[0])
        print(
            f"| {TITLES[name]} | {seed} | {expected:.3f} | {found:.3f} | {found - expected:+.3f} | "
            f"{time.monotonic() - began:.0f} s |",
            flush=True,
        )
        runs = json.loads(RUNS.read_text()) if RUNS.exists() else {}
        runs.setdefault(name, {})[str(seed)] = round(found, 4)
        RUNS.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")


# --- The page -------------------------------------------------------------------------------------


def values() -> str:
    """The table of two answers."""
    lines = ["| | " + " | ".join(f"β = {beta:g}" for beta in BETAS) + " |", "| --- " * 4 + "|"]
    for words, given in TWO_ANSWERS.items():
        row = [by_formula(Setting(**given, beta=beta))[0] for beta in BETAS]
        lines.append(f"| {words} | " + " | ".join(f"{p:.6f}" for p in row) + " |")
    return "\n".join(lines) + "\n"


def three() -> str:
    """The table of three answers."""
    titles = [f"answer worth {r:g}" for r in THREE["reward_K"]]
    reference = " | ".join(f"{q:.5f}" for q in THREE["reference_K"])
    lines = [f"| | {' | '.join(titles)} |", "| --- " * 4 + "|", f"| the reference | {reference} |"]
    for words, given in THREE_ANSWERS.items():
        row = by_formula(Setting(**given))
        lines.append(f"| {words} | " + " | ".join(f"{p:.5f}" for p in row) + " |")
    return "\n".join(lines) + "\n"


def trained() -> str:
    """The table of the runs."""
    lines = ['| `"std"`, G = 8, β = 1 | formula | seed 0 | seed 1 | seed 2 |', "| --- " * 5 + "|"]
    runs = json.loads(RUNS.read_text())
    for name in (name for name in KL_TERMS if name in runs):
        expected = by_formula(Setting(name, beta=1.0))[0]
        row = " | ".join(f"{runs[name][str(seed)]:.3f}" for seed in range(3))
        lines.append(f"| {TITLES[name]} | {expected:.3f} | {row} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its tables as the code makes them."""
    for mark, made in (("values", values()), ("three", three()), ("trained", trained())):
        head, _, rest = text.partition(f"<!-- {mark} -->\n")
        _, _, tail = rest.partition(f"<!-- end of {mark} -->")
        text = f"{head}<!-- {mark} -->\n{made}<!-- end of {mark} -->{tail}"
    return text


PANELS = {
    "k3 in the loss": ("k3",),
    "k2 or k3 times ratio in the loss": ("k3_ratio", "k2"),
    "k1 in the reward": ("reward",),
}


def draw(file: Path) -> None:
    """Limits by β, a panel for each kind of limit, a curve for each group; dots are runs."""
    from matplotlib.figure import Figure

    from grpo_jax.metrics import curves

    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained", facecolor="white")
    beta_N, q = np.geomspace(0.25, 4, 81), Setting("k3", 1.0).reference_K[0]
    runs = json.loads(RUNS.read_text())
    lines = [(f"σ, G = {g}" if g < math.inf else "σ, G → ∞", {"group": g})
             for g in (2, 8, 64, math.inf)]  # fmt: skip
    lines.append(("no σ, G = 8", {"scale_by": "none"}))
    for ax, (title, names) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items()):
        curves.frame(ax)
        shown = [("any scale, any G", {})] if names == ("reward",) else lines
        for (label, given), color in zip(shown, curves.COLORS):
            p_N = [by_formula(Setting(names[0], beta=b, **given))[0] for b in beta_N]
            style = "--" if "scale_by" in given else "-"
            ax.plot(beta_N, p_N, style, color=color, linewidth=1.6, label=label)
        for name, marker in zip(names, "os"):
            if found := list(runs.get(name, {}).values()):
                label = f"runs, {name}, σ, G = 8" if len(names) > 1 else "runs, σ, G = 8"
                ax.plot([1.0] * len(found), found, marker, color="#2b2f36", markersize=5,
                        markerfacecolor="none", label=label)  # fmt: skip
        ax.axhline(q, color="#717a86", linewidth=1, linestyle=":")
        ax.text(4, q - 0.03, "reference", fontsize=7.5, color="#717a86", ha="right")
        ax.set_xscale("log", base=2)
        ticks = (0.25, 0.5, 1, 2, 4)
        ax.set_xticks(ticks, [f"{b:g}" for b in ticks])
        ax.minorticks_off()
        ax.set_ylim(0.2, 1.02)
        ax.set_xlabel("β", fontsize=8.5)
        ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        ax.legend(frameon=False, fontsize=7.8)
    figure.axes[0].set_ylabel("probability of the right answer", fontsize=8.5)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("part", choices=("enumerate", "train", "write"))
    parser.add_argument("names", nargs="*", metavar="KL", help=f"of {', '.join(KL_TERMS)}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workdir", type=Path, default=Path("runs/preference"), metavar="DIR")
    args = parser.parse_args()
    if args.part == "enumerate":
        print(f"at most {compare():.1e} apart")
    elif args.part == "train":
        train_all(args.names or list(KL_TERMS), args.steps, args.workdir)
    else:
        file = DOCS / "preference_aggregation.md"
        file.write_text(page(file.read_text()))
        draw(DOCS / "pictures" / "preference_aggregation.png")


if __name__ == "__main__":
    main()
