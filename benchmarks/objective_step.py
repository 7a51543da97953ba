"""Times the updates of two objectives in turn, in one process: their ratio.

    python benchmarks/objective_step.py --presets bnpo,gspo --model tiny --mean_tokens 32

Both learn from the same rollouts; step by step one goes first, then the other. The first preset is
the measure. An objective of whole completions ("gspo", "gmpo", "vespo") goes through the vocabulary
once more in its backward pass.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys

import timing
import workload


def main() -> None:
    """Prints seconds of an update by preset, and their ratio: median, and the middle half."""
    name, presets = "--presets", "bnpo,gspo"
    if name in sys.argv:
        at = sys.argv.index(name)
        presets = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    work, args = timing.arguments(__doc__.splitlines()[0])
    first, second = presets.split(",")
    steps = {p: workload.Step(dataclasses.replace(work, preset=p)) for p in (first, second)}
    seconds: dict[str, list[float]] = {first: [], second: []}
    for n in range(args.steps + 2):
        rollouts = steps[first].rollout(n)
        for preset in (first, second) if n % 2 else (second, first):
            experience = steps[preset].prepare(rollouts)
            _, took = timing.timed(lambda e=experience, s=steps[preset]: s.update(e))
            if n >= 2:
                seconds[preset].append(took)
    ratios = sorted(b / a for a, b in zip(seconds[first], seconds[second]))
    print(timing.environment(), dataclasses.asdict(work))
    for preset, took in seconds.items():
        print(f"{preset}: {statistics.median(took):.4f} s an update, of {len(took)}")
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"{second} / {first}: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
