"""Times rollouts with and without over-sampling in turn, and counts decode steps and lengths.

    python benchmarks/oversample.py --prompts 16 --group 4 --completion_tokens 256 --mean_tokens 48
    python benchmarks/oversample.py --counts

Lengths are geometric and cut at the limit. --oversample is that of `prompts.oversample`. Both draws
give --prompts whole groups, each of its own random completions. --counts only counts decode steps
and tokens, of drawn lengths: they follow from these alone if the slots hold all completions.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys

import numpy as np
import timing
import workload
from objective_step import option

from grpo_jax.sampling import early_stop
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.early_stop import FirstGroups


def count(prompts: int, group: int, limit: int, mean: int, factor: float) -> np.ndarray:
    """Means of decode steps, mean length and tokens: of all, and of the first to finish, [2, 3]."""
    rng, found = np.random.default_rng(0), []
    between = early_stop.steps_between(Decoder(None, None, None, (), limit))
    for _ in range(400):
        shape = math.ceil(factor * prompts), group
        length_PG = np.minimum(rng.geometric(1 / mean, shape), limit)
        longest_P, plain_PG = length_PG.max(axis=1), length_PG[:prompts]
        kept = np.argsort(longest_P, kind="stable")[:prompts]
        steps = min(-(-(longest_P[kept[-1]] - 1) // between) * between, longest_P.max() - 1)
        drawn = np.minimum(length_PG, steps + 1).sum()
        whole = plain_PG.max() - 1, plain_PG.mean(), plain_PG.sum()
        found.append((whole, (steps, length_PG[kept].mean(), drawn)))
    return np.mean(found, axis=0)


COUNTED = ((16, 4, 256, 48), (32, 8, 1024, 200), (32, 8, 4096, 500), (128, 8, 8192, 1000))


def print_counts() -> None:
    print("| prompts x group, limit, mean | oversample | decode steps | mean length | tokens |")
    print("| --- | --- | --- | --- | --- |")
    for prompts, group, limit, mean in COUNTED:
        for factor in (1.125, 1.25, 1.5):
            whole, first = count(prompts, group, limit, mean, factor)
            steps, length, tokens = first / whole
            print(
                f"| {prompts} x {group}, {limit}, {mean} | {factor} | {whole[0]:.0f} to "
                f"{first[0]:.0f}, {steps:.2f} | {length:.2f} | {tokens:.2f} |"
            )


def main() -> None:
    """Prints medians of both, and ratios by step: median, and the middle half."""
    if "--counts" in sys.argv:
        print_counts()
        return
    factor = float(option("--oversample", "1.25"))
    work, args = timing.arguments(__doc__.splitlines()[0])
    begun = math.ceil(factor * work.prompts)
    steps = {
        "all": workload.Step(work),
        "first": workload.Step(dataclasses.replace(work, prompts=begun)),
    }
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for n in range(args.steps + 2):
        for name in ("all", "first") if n % 2 else ("first", "all"):
            one = steps[name]
            first = FirstGroups(work.prompts, begun, work.group) if name == "first" else None
            rollouts, took = timing.timed(lambda s=one, f=first, n=n: s.rollout(n, first=f))
            length_PG = rollouts.length_PG
            tokens, longest = length_PG.sum(), length_PG.max()
            if first is not None:
                tokens, longest = first.length_PG.sum(), first.length_PG.max()
                length_PG = length_PG[first.kept]
            if n >= 2:
                found[name].append((took, longest - 1, length_PG.mean(), length_PG.sum() / tokens))
    print(timing.environment(), dataclasses.asdict(work), f"{args.steps} rollouts")
    print("| | seconds | decode steps | mean length of what is kept | share of tokens kept |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in found.items():
        cells = [statistics.median(column) for column in zip(*rows)]
        print("| {} | {:.4f} | {:.0f} | {:.1f} | {:.2f} |".format(name, *cells))
    ratios = np.array(found["first"])[:, :2] / np.array(found["all"])[:, :2]
    for name, column in zip(("seconds", "decode steps"), ratios.T):
        low, median, high = np.quantile(column, (0.25, 0.5, 0.75))
        print(f"{name}, first / all: {median:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    sys.exit(main())
