"""Times the updates of two objectives in turn, in one process: their ratio.

    python benchmarks/objective_step.py --presets bnpo,gspo --model tiny --mean_tokens 32
    python benchmarks/objective_step.py --model qwen2.5-0.5b --layers 6 --vocabulary 37984 ...

Both learn from the same rollouts; step by step one goes first, then the other. The first preset is
the measure. An objective of whole completions ("gspo", "gmpo", "vespo") goes through the vocabulary
once more in its backward pass. What that takes depends on the vocabulary's share of the update's
products. --layers and --vocabulary replace those of the model: a quarter of both leaves the share,
and the sizes of all products but one, as they are.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time

import timing
import workload
from workload import Work

from grpo_jax.devices import roofline
from grpo_jax.structs import Layer, Rollouts


def option(name: str, default: str) -> str:
    """Takes an option of this program's own from the command line."""
    if name not in sys.argv:
        return default
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


def share_of_vocabulary(work: Work, rollouts: Rollouts) -> float:
    """Its products, of all products of an update that computes the logits once."""
    lengths = rollouts.prompt_length_P, rollouts.length_PG
    head = 2.0 * work.shape.vocab_size * work.shape.width * rollouts.length_PG.sum()
    return float(head / roofline.forward(work.shape, *lengths).flops)


def told(name: str, seconds: dict[str, list[float]]) -> str:
    """The ratio of two presets' seconds: median, and the middle half."""
    first, second = seconds
    ratios = sorted(b / a for a, b in zip(seconds[first], seconds[second]))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    each = ", ".join(f"{p} {statistics.median(took):.4f}" for p, took in seconds.items())
    return f"{name}: {each}; ratio {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Prints seconds of an update by preset, of the clock and of the CPUs, and their ratios."""
    first, second = option("--presets", "bnpo,gspo").split(",")
    layers, vocabulary = option("--layers", ""), option("--vocabulary", "")
    work, args = timing.arguments(__doc__.splitlines()[0])
    shape = workload.SHAPES[work.model]
    if layers:
        shape = dataclasses.replace(shape, layers=(Layer(),) * int(layers))
    if vocabulary:
        shape = dataclasses.replace(shape, vocab_size=int(vocabulary))
    workload.SHAPES[work.model] = shape
    steps = {p: workload.Step(dataclasses.replace(work, preset=p)) for p in (first, second)}
    wall: dict[str, list[float]] = {first: [], second: []}
    cpu: dict[str, list[float]] = {first: [], second: []}
    for n in range(args.steps + 2):
        rollouts = steps[first].rollout(n)
        for preset in (first, second) if n % 2 else (second, first):
            experience = steps[preset].prepare(rollouts)
            before = time.process_time()
            _, took = timing.timed(lambda e=experience, s=steps[preset]: s.update(e))
            if n >= 2:
                wall[preset].append(took)
                cpu[preset].append(time.process_time() - before)
    share = share_of_vocabulary(work, rollouts)
    print(timing.environment(), dataclasses.asdict(work), f"{args.steps} updates")
    print(f"v = {share:.3f} of the products are the vocabulary's; 1 + v / 3 = {1 + share / 3:.3f}")
    print(told("seconds", wall))
    print(told("CPU seconds", cpu))


if __name__ == "__main__":
    main()
