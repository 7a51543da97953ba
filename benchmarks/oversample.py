"""Times rollouts with and without over-sampling in turn, and counts decode steps and lengths.

    python benchmarks/oversample.py --prompts 16 --group 4 --completion_tokens 256 --mean_tokens 48

Lengths are geometric and cut at the limit. --oversample is that of `prompts.oversample`. Both draws
give --prompts whole groups, each of its own random completions.
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

from grpo_jax.sampling.early_stop import FirstGroups


def main() -> None:
    """Prints medians of both, and ratios by step: median, and the middle half."""
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
