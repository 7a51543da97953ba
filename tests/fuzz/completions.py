"""Puts completions that try to hang or crash a reward in front of every built-in one.

    python tests/fuzz/completions.py --completions 10000 [--seed N] [--reward NAME]

A value must be a finite number or None, after at most ten seconds of processor time. A failure is
shown on standard error, and the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__":  # pytest has conftest.py for this
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "tests" / "helpers"), str(root)]

import adversarial
import attacked

AT_ONCE = 500  # of which 22 are texts of 1 MB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", choices=attacked.NAMES, help="only this one")
    args = parser.parse_args()
    print("| reward | completions | failures | seconds | slowest s |")
    print("| --- | --- | --- | --- | --- |")
    failed = 0
    for name in [args.reward] if args.reward else attacked.NAMES:
        if lacks := attacked.lacks(name):
            print(f"{name} {lacks}", file=sys.stderr)
            continue
        began, most, failures = time.perf_counter(), 0.0, 0
        for number, count in enumerate(_parts(args.completions)):
            try:
                cases = adversarial.make(count, args.seed + number)
                most = max(most, attacked.slowest_s(name, cases))
            except Exception:
                failures += 1
                print(f"--- {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - began
        print(
            f"| {name} | {args.completions} | {failures} | {seconds:.0f} | {most:.3f} |", flush=True
        )
        failed += failures
    return int(failed > 0)


def _parts(completions: int) -> list[int]:
    return [min(AT_ONCE, completions - i) for i in range(0, completions, AT_ONCE)]


if __name__ == "__main__":
    sys.exit(main())
