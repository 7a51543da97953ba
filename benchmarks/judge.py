"""How long many judgements take against a server that needs a fixed time for each.

    python benchmarks/judge.py [--judgements 256] [--delay 0.2] [--concurrency 32]

Judges single answers in groups of 8, as they come from a rollout, by a server in a process of its
own. Prints seconds, the least time that the server's delay and the concurrency allow, and the
seconds of the same judgements from the cache.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grpo_jax.rewards import registry
from grpo_jax.rewards.judging import rubric
from grpo_jax.rewards.judging.cache import Cache
from grpo_jax.rewards.judging.client import Limits
from grpo_jax.rewards.judging.judges import Judges, Settings
from grpo_jax.rewards.pool import Pool

ROOT = Path(__file__).resolve().parents[1]
GROUP = 8


def measure(url: str, judgements: int, concurrency: int, cache: Cache) -> tuple[float, int, int]:
    """Seconds, calls and failures; each text is another, so none is kept of an earlier one."""
    file = str(ROOT / "configs" / "rubrics" / "helpful.toml")
    settings = {"helpful": Settings(rubric.read(file), url, "stub")}
    host = Judges(settings, Limits(concurrency=concurrency), cache)
    with Pool(registry.load((f"judge:{file}",), (1.0,)), host=host) as pool:
        began = time.monotonic()
        tickets = []
        for i in range(0, judgements, GROUP):
            texts = [f"Answer {k}, in so many words. " * 20 for k in range(i, i + GROUP)]
            tickets.append(pool.submit(["Why?"] * GROUP, texts, {}, group=GROUP))
        scores = [ticket.result() for ticket in tickets]
        seconds = time.monotonic() - began
    calls = int(sum(s.sums["judge/calls"] for s in scores))
    return seconds, calls, sum(int(s.unknown_B.sum()) for s in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--judgements", type=int, default=256)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, default=32)
    args = parser.parse_args()
    stub = str(ROOT / "tests" / "helpers" / "stub_judge.py")
    command = [sys.executable, stub, "--delay", str(args.delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "kept", "wb") as kept:
            cache = Cache(append=kept.write)
            seconds, calls, failed = measure(url, args.judgements, args.concurrency, cache)
            again, repeated, _ = measure(url, args.judgements, args.concurrency, cache)
        server.kill()
    least = math.ceil(args.judgements / args.concurrency) * args.delay
    print(
        f"{args.judgements} judgements of {args.delay:g} s, {args.concurrency} at once: "
        f"{seconds:.2f} s in {calls} calls, {failed} failed; the least possible is {least:.2f} s. "
        f"Again, from the cache: {again:.3f} s in {repeated} calls."
    )


if __name__ == "__main__":
    main()
