"""How long a checkpoint takes to save and restore, and how much of that is checking its files.

    python benchmarks/checkpoint.py [--mib 1024] [--times 3]

Saves float32 parameters and two moments of random numbers, which do not compress, and restores
them. Prints the median seconds until a save lets the run go on, until it is whole on disk, of
hashing within that, of a restore without checking, and of checking before it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from grpo_jax.messages.console import say
from grpo_jax.run import checksums
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.structs import TrainState

LAYERS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--mib", type=int, default=1024, help="size of the checkpoint")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--folder", help="where to save; default: the usual place for such")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    write = checksums.write

    def hashed(*given, **named) -> None:
        began = time.monotonic()
        write(*given, **named)
        seconds["hashing of it"].append(time.monotonic() - began)

    def took(what: str, began: float) -> None:
        seconds[what].append(time.monotonic() - began)

    size = args.mib * 2**20 // (3 * 4 * LAYERS)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
        for number in range(args.times):
            state = _state(size, number)
            began = time.monotonic()
            with mock.patch.object(checksums, "write", hashed):
                checkpoints.save(state, {})
                took("a save until the run goes on", began)
                checkpoints.wait()
            took("a save until it is whole", began)
            began = time.monotonic()
            newest = checkpoints.latest()
            took("checking before a restore", began)
            began = time.monotonic()
            jax.block_until_ready(checkpoints.restore(newest, state))
            took("a restore after that", began)
        checkpoints.close()
    say(f"{args.mib:,} MiB in {3 * LAYERS} arrays, medians of {args.times}")
    for what, times in seconds.items():
        say(f"{what:<30} {statistics.median(times):6.2f} s")


def _state(size: int, seed: int) -> TrainState:
    made = jax.random.normal(jax.random.key(seed), (3, LAYERS, size))
    params, first, second = ({str(i): x for i, x in enumerate(one)} for one in made)
    number = jnp.int32(seed + 1)
    return jax.block_until_ready(TrainState(params, (first, second), number, jnp.int32(0)))


if __name__ == "__main__":
    main()
