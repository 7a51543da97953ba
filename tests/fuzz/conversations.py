"""Makes conversations with an environment, and compares each with one rendering of the whole.

    python tests/fuzz/conversations.py --episodes 10000 [--seed N] [--qwen25 FOLDER]
        [--template qwen3=FILE ...]

Every episode is appended turn by turn as the trainer does it. The ids that the policy sampled must
stand where they were put, calls must be read as they were written, texts of the environment must
add no control token and keep to their limit, and where the episode holds only what a rendering
holds, all ids must be those that transformers makes of the whole at once. A line per family tells
what was compared; the exit status is 1 for any mismatch. `--qwen25`: a folder with that model's
tokenizer; None: the one of the shared data, if GRPO_JAX_SHARED names them. `--template`: a file in
place of a template of our own, by its name in `helpers/made_episodes.py`.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # pytest has conftest.py for this
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "tests" / "helpers"), str(root)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import made_episodes
from transformers import AutoTokenizer

from grpo_jax.data.templates import Renderer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--qwen25", type=Path)
    parser.add_argument("--template", action="append", default=[])
    asked = parser.parse_args()
    shared = os.environ.get("GRPO_JAX_SHARED")
    folder = asked.qwen25 or (shared and Path(shared) / "tokenizers" / "qwen2.5-instruct")
    qwen25 = AutoTokenizer.from_pretrained(folder) if folder else None
    named = (entry.split("=", 1) for entry in asked.template)
    families = made_episodes.families(qwen25, {n: Path(f).read_text() for n, f in named})
    total: collections.Counter[str] = collections.Counter()
    with Renderer() as renderer:
        for number, family in enumerate(families):
            share = asked.episodes * (number + 1) // len(families)
            share -= asked.episodes * number // len(families)
            counts = compared(family, renderer, range(asked.seed, asked.seed + share))
            print(json.dumps({"family": family.name, **counts}), flush=True)
            total.update({k: v for k, v in counts.items() if isinstance(v, int)})
    print(json.dumps({"family": "all", **total}))
    return int(total["mismatches"] > 0)


def compared(family: made_episodes.Family, renderer: Renderer, seeds: range) -> dict[str, object]:
    """What was compared of some episodes of a family, and what differed."""
    episodes, start = made_episodes.Episodes(family, renderer), time.perf_counter()
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        found = episodes.run(seed)
        counts["episodes"] += 1
        counts["turns"] += found.turns
        counts["with one rendering"] += found.rendered
        counts["mismatches"] += len(found.mismatches)
        kinds.update(found.kinds)
        for what in found.mismatches:
            print(f"{family.name}, episode {seed}: {what}", file=sys.stderr)
    seconds = round(time.perf_counter() - start, 1)
    return {**counts, "kinds": dict(sorted(kinds.items())), "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
