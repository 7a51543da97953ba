"""Counts what the rows of updates compute, and how many sizes of them a run compiles.

    python benchmarks/rows.py
    python benchmarks/rows.py --seconds

No model runs without `--seconds`: lengths are drawn, packed as the trainer packs them, and
counted. A problem has a length of its own, about which its completions differ, as those of a model
do; "alike" has geometric lengths instead, the same for all problems. Shares are of the tokens that
must be computed, each prompt once and each completion but its last token. Beside it what the usual
ways compute: every completion with its prompt and padding to the longest of its microbatch, in the
order of the batch ("padded"), or without any padding ("own prompts").

`--seconds` times the reference and the update of four such batches on this machine, three times
over, the first with compiling: to be run with two versions of the package, in turns.
"""

import argparse
import dataclasses
import time

import numpy as np
import workload

from grpo_jax.learner import packing
from grpo_jax.learner.scoring import cut_to
from grpo_jax.structs import Rollouts

STEPS, GROUP, PADDED_AT_ONCE = 100, 8, 8


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    prompts: int
    prompt_tokens: int
    limit: int
    first: int  # mean length at the first step
    last: int  # and at the last
    spread: float = 0.4  # of the logarithm of problems' lengths; 0: alike
    at_once: int = 8192
    minibatches: int = 1
    shards: int = 1

    def lengths(self, step: int) -> np.ndarray:
        """Of a step's completions, by shard [S, P, G]."""
        rng = np.random.default_rng([step, 11])
        shape = self.shards, self.prompts // self.shards, GROUP
        mean = self.first + (self.last - self.first) * step / STEPS
        if self.spread:
            problem = rng.lognormal(0, self.spread, (*shape[:2], 1))
            drawn = mean * problem * rng.lognormal(0, self.spread / 2, shape)
        else:
            drawn = rng.geometric(1 / mean, shape)
        return np.clip(np.round(drawn), 1, self.limit).astype(np.int32)


CASES = (
    Case("alike, mean 200", 64, 256, 1024, 200, 200, spread=0.0),
    Case("mean 200", 64, 256, 1024, 200, 200),
    Case("mean 200, four minibatches", 64, 256, 1024, 200, 200, minibatches=4),
    Case("mean 200, four data shards", 64, 256, 1024, 200, 200, shards=4),
    Case("mean 200, sixteen data shards", 128, 256, 1024, 200, 200, shards=16),
    Case("growing from 200 to 600", 64, 256, 1024, 200, 600),
    Case("growing from 500 to 1,500", 64, 256, 4096, 500, 1500, spread=0.5),
    Case("full", 64, 256, 1024, 100_000, 100_000),
    Case("quickstart", 32, 16, 40, 14, 24, spread=0.25, at_once=1536),
)


def count(case: Case) -> list[float]:
    """Excess of rows in the mean and at most, of the usual ways; sizes of rows."""
    from grpo_jax.learner import row_sizes
    from grpo_jax.learner.row_sizes import (
        CompiledSizes,  # here: a version to compare with may lack it
    )

    sizes = CompiledSizes()
    excess, padded, unpadded, programs = [], [], [], set()
    for step in range(STEPS):
        length_SPG = case.lengths(step)
        flat_PG = length_SPG.reshape(-1, GROUP)
        order_P = row_sizes.balance(flat_PG, case.shards, case.minibatches)
        length_SPG = flat_PG[order_P].reshape(length_SPG.shape)
        for index in range(case.minibatches):
            groups_P = np.arange(length_SPG.shape[1])[index :: case.minibatches]
            made = packing.pack(
                length_SPG,
                groups_P,
                prompt_tokens=case.prompt_tokens,
                completion_tokens=cut_to(case.limit, int(length_SPG.max())),
                at_once=case.at_once,
                sizes=sizes,
            )
            programs.add((made.groups_SMJ.shape, made.token_SMBX.shape, made.lane_SMJWT.shape))
            per_row = made.groups_SMJ.shape[-1] * case.prompt_tokens + made.token_SMBX.shape[-1]
            length_B = length_SPG[:, groups_P].reshape(-1)
            prompts = length_B.size // GROUP * case.prompt_tokens
            needed = prompts + (length_B - 1).sum()
            longest = length_B.reshape(-1, PADDED_AT_ONCE).max(1)
            own = length_B.size * case.prompt_tokens
            excess.append(case.shards * made.number * per_row / needed - 1)
            padded.append((own + PADDED_AT_ONCE * longest.sum()) / needed - 1)
            unpadded.append((own + length_B.sum()) / needed - 1)
    return [np.mean(excess), np.max(excess), np.mean(unpadded), np.mean(padded), len(programs)]


def seconds(spread: float) -> list[float]:
    """Of the reference and the update of four batches: with compiling, and twice without."""
    case = Case("", 16, 48, 256, 60, 60, spread)
    work = workload.PackingProblem(
        prompts=case.prompts,
        group=GROUP,
        prompt_tokens=case.prompt_tokens,
        completion_tokens=case.limit,
    )
    workload.use_all_cores(work)
    step, batches, passes = workload.Step(work), [], []
    for n in range(4):
        rng, length_PG = np.random.default_rng([n, 13]), case.lengths(n)[0]
        ids = lambda *shape: rng.integers(2, work.shape.vocab_size, shape, dtype=np.int32)  # noqa: B023, E731
        completion_PGC = ids(*length_PG.shape, case.limit)
        batches.append(
            Rollouts(
                prompt_PQ=ids(case.prompts, case.prompt_tokens),
                prompt_length_P=np.full(case.prompts, case.prompt_tokens, np.int32),
                completion_PGC=completion_PGC,
                logp_PGC=np.full(completion_PGC.shape, -1.0, np.float32),
                length_PG=length_PG,
                stopped_PG=np.ones(length_PG.shape, bool),
            )
        )
    for _ in range(3):
        began = time.perf_counter()
        for rollouts in batches:
            step.update(step.prepare(rollouts))
        passes.append(time.perf_counter() - began)
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", action="store_true")
    if parser.parse_args().seconds:
        for spread in (0.4, 0.0):
            print(spread, *(f"{s:.1f} s" for s in seconds(spread)), flush=True)
        return
    print("| completions | more than needed | at most | own prompts | padded | sizes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        *shares, sizes = count(case)
        print(f"| {case.name} |", *(f"{share:.0%} |" for share in shares), f"{sizes} |", flush=True)


if __name__ == "__main__":
    main()
