"""Checks every combination of the parts of an objective that the rules accept.

    python tests/algorithm/objective_campaign.py [--one-of N]

The loss and its gradient are those of the papers (`helpers/papers.py`, PyTorch), to 1e-6; and the
gradient, in log-probabilities and entropies, is that of the value by central differences at every
token, to 1e-6, with all held fixed that the objective holds fixed. All is in float64. What differs
is shown on standard error, and ends the program with status 1.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # pytest has conftest.py for this
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "tests" / "helpers"), str(root)]
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
import papers

from grpo_jax import config as config_lib
from grpo_jax.algorithm import losses
from grpo_jax.algorithm.objective import Objective, TokenTerms
from grpo_jax.config import objective_rules, options

B, T = 7, 4
_STEP = 1e-6  # of the differences
_TOLERANCE = 1e-6

Options = dict[str, Any]


def _choices(name: str) -> list[Options]:
    return [{name: value} for value in options.BY_NAME[f"algorithm.{name}"].choices]


_BOUND = {"rollout_correction.cap": 1.3}
# The parts, each with its choices. Where a choice needs numbers, some that act on the batch.
PARTS: dict[str, list[Options]] = {
    "ratio": _choices("ratio"),
    "surrogate": [
        {**one, **({"mask_threshold": 0.05} if one["surrogate"].endswith("_mask") else {})}
        | ({"ratio_cap": 1.2} if one["surrogate"] == "cispo" else {})
        for one in _choices("surrogate")
    ],
    "dual clips": [
        {},
        {"dual_clip_ratio": 1.2},
        {"dual_clip_loss": 1.15},
        {"dual_clip_ratio": 1.3, "dual_clip_loss": 1.15},
    ],
    "sequence mask": [{}, {"max_sequence_drift": 0.2}],
    "correction": [
        {},
        *(
            {"rollout_correction.level": level, "rollout_correction.bound": bound, **_BOUND} | floor
            for level in ("token", "sequence")
            for bound in ("truncate", "mask")
            for floor in ({}, {"rollout_correction.floor": 0.7})
        ),
    ],
    "normalizer": _choices("normalizer"),
    "KL": [{}, *({"kl_coef": 0.3, **one} for one in _choices("kl_estimator"))],
    "entropy": [{}, {"entropy_coef": 0.2}],
}


def batch() -> dict[str, np.ndarray]:
    """Completions of 1 to T tokens, and one of none; their ratios are on all sides of bounds."""
    rng = np.random.default_rng(3)
    logp = -rng.exponential(0.8, (B, T)) - 0.02
    # One completion has hardly changed, so that no correction masks all of them.
    change = np.where(np.arange(B) == 5, 0.05, 0.45)[:, None]
    near = lambda: np.minimum(logp + change * rng.normal(size=(B, T)), -0.01)  # noqa: E731
    length = np.array([4, 1, 0, 4, 3, 4, 2])
    action = np.arange(T) < length[:, None]
    action[3, 1] = False  # a token of an environment
    return {
        "logp": logp, "old": near(), "ref": near(), "sampler": near(),
        "entropy": rng.uniform(0.1, 2, (B, T)), "action": action,
        "advantage": np.array([1.2, -0.7, 0.5, -1.5, 0.8, 0.9, -0.4]),
    }  # fmt: skip


BATCH = batch()


def accepted(
    combinations: Iterable[tuple[Options, ...]], refused: collections.Counter
) -> Iterator[Options]:
    """The combinations of parts that the rules accept; counts the others by the options named."""
    config = config_lib.default()
    for parts in combinations:
        chosen: Options = {k: v for part in parts for k, v in part.items()}
        clips = chosen["surrogate"] == "clip"
        chosen |= {"clip_low": 0.15, "clip_high": 0.07} if clips else {}
        for option in _USED:
            section, _, leaf = option.rpartition(".")
            name = f"{section or 'algorithm'}.{leaf}"
            config[section or "algorithm"][leaf] = chosen.get(option, options.BY_NAME[name].default)
        try:
            objective_rules.check(config)
        except ValueError as error:
            refused[_rule(str(error))] += 1
            continue
        yield chosen


_USED = sorted(
    {k for part in PARTS.values() for one in part for k in one} | {"clip_low", "clip_high"}
)


def _rule(message: str) -> str:
    """The options that a refusal names, without their values."""
    names = re.findall(r"\b[a-z_]+\.[a-z_]+[a-z]", message)
    return " with ".join(dict.fromkeys(names))


def _terms(objective: Objective, with_old: bool) -> TokenTerms:
    action = jnp.asarray(BATCH["action"])
    take = lambda x: jnp.where(action, jnp.asarray(x), 0)  # noqa: E731
    old = BATCH["old"] if with_old else BATCH["logp"]
    of_sequence = losses.sequence_log_ratio(take(old), take(BATCH["sampler"]), action)
    return TokenTerms(
        advantage=take(BATCH["advantage"][:, None]),
        sampler_logp=take(BATCH["sampler"]),
        old_logp=take(old) if with_old else None,
        ref_logp=take(BATCH["ref"]),
        sequence_log_ratio=take(of_sequence[:, None]) if objective.sums_sequences else None,
        action=action,
    )


def _loss(chosen: Options, with_old: bool) -> Callable[[jax.Array], jax.Array]:
    """The loss of the batch as a function of log-probabilities and entropies [2, B, T]."""
    objective = Objective.of({"rollout.max_tokens": T, **chosen})
    terms, action = _terms(objective, with_old), jnp.asarray(BATCH["action"])
    weight, count = losses.weights(action, objective, jnp.float64)

    def loss(both: jax.Array) -> jax.Array:
        logp, entropy = jnp.where(action, both, 0)
        per_token = losses.token_loss(objective, logp, entropy, terms)
        return jnp.where(action, weight * per_token, 0).sum() / count

    return loss


def _slope_by_differences(loss: Callable, at: np.ndarray) -> np.ndarray:
    """The gradient by central differences; what `stop_gradient` holds keeps its value at `at`."""
    held: list[np.ndarray] = []

    def record(x: jax.Array) -> jax.Array:
        held.append(np.asarray(x))
        return x

    with mock.patch.object(jax.lax, "stop_gradient", record):
        loss(jnp.asarray(at))
    rest = iter(held)
    moved = _STEP * np.eye(at.size).reshape(-1, *at.shape)
    with mock.patch.object(jax.lax, "stop_gradient", lambda x: jnp.asarray(next(rest))):
        values = jax.vmap(loss)(jnp.asarray(np.concatenate([at + moved, at - moved])))
    up, down = np.asarray(values).reshape(2, *at.shape)
    return (up - down) / (2 * _STEP)


def difference(chosen: Options, with_old: bool) -> str:
    """What is wrong with a combination; "" if nothing is. `with_old`: not the first update."""
    with jax.enable_x64(True):
        loss = _loss(chosen, with_old)
        at = np.stack([BATCH["logp"], BATCH["entropy"]])
        value, slope = (np.asarray(x) for x in jax.value_and_grad(loss)(jnp.asarray(at)))
        measured = _slope_by_differences(loss, at)
    given = {**BATCH, "old": BATCH["old"] if with_old else None}
    want, by_logp = papers.loss(chosen, **given)
    scale = max(np.abs(by_logp).max(), np.abs(slope).max())
    if not scale > 1e-4:
        return f"its gradient is at most {scale}"
    if abs(value - want) > _TOLERANCE * max(abs(want), 1):
        return f"its value is {value}, and the paper's {want}"
    if (error := np.abs(slope[0] - by_logp).max()) > _TOLERANCE * scale:
        return f"its gradient is off the paper's by {error}, of {scale}"
    if (error := np.abs(slope - measured).max()) > _TOLERANCE * scale:
        return f"its gradient is off that of its value by {error}, of {scale}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one-of", type=int, default=1, metavar="N", help="every Nth alone")
    args = parser.parse_args()
    began, refused, failures = time.process_time(), collections.Counter(), 0
    combinations = itertools.islice(itertools.product(*PARTS.values()), 0, None, args.one_of)
    found = list(accepted(combinations, refused))
    cases = list(itertools.product(found, (True, False)))
    for chosen, with_old in cases:
        if wrong := difference(chosen, with_old):
            failures += 1
            print(f"{chosen}, {'with' if with_old else 'without'} old: {wrong}", file=sys.stderr)
    print("| | number |\n| --- | --- |")
    print(f"| combinations | {len(found) + refused.total():,} |")
    for rule, number in refused.most_common():
        print(f"| refused: {rule} | {number:,} |")
    print(f"| accepted | {len(found):,} |")
    print(f"| checked, in a rollout's first update and in a later one | {len(cases):,} |")
    print(f"| failures | {failures:,} |")
    print(f"| seconds of one core | {time.process_time() - began:.0f} |")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
