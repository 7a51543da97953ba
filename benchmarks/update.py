"""Times the update of a step beside its floor: `python benchmarks/update.py --model tiny`."""

import timing

if __name__ == "__main__":
    timing.run(__doc__, ("update",))
