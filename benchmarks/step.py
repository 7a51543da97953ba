"""Times a whole step by phase beside its floors: `python benchmarks/step.py --model tiny`."""

import timing

if __name__ == "__main__":
    timing.run(__doc__, ("rollout", "prepare", "update"))
