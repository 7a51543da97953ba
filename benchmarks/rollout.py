"""Times the rollout of a step beside its floor: `python benchmarks/rollout.py --model tiny`."""

import timing

if __name__ == "__main__":
    timing.run(__doc__, ("rollout",))
