"""The command line, the repeats and the table that the benchmarks of phases share."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import floors
import jax
import jaxlib
import workload
from workload import Work

from grpo_jax.devices import memory, roofline


def arguments(description: str) -> tuple[Work, argparse.Namespace]:
    """The work to time, an option for each of its fields, and how to time it."""
    parser = argparse.ArgumentParser(description=description)
    for field in dataclasses.fields(Work):
        if field.type == "bool":
            parser.add_argument(
                f"--{field.name}", action=argparse.BooleanOptionalAction, default=field.default
            )
        else:
            kind = int if field.type == "int" else str
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--steps", type=int, default=10, help="timed, after two that warm up")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.model not in workload.SHAPES:
        parser.error(f"--model {args.model}: choose from {', '.join(workload.SHAPES)}")
    return Work(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Work)}), args


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, once the device has finished it, and its seconds."""
    began = time.perf_counter()
    value = jax.block_until_ready(call())
    return value, time.perf_counter() - began


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device.device_kind} ({jax.default_backend()})",
        "machine": f"{platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "jax": f"{jax.__version__} (jaxlib {jaxlib.__version__})",
    }


class Phases:
    """Seconds of each phase by step, the floor of each, and that of its matrix products alone."""

    def __init__(self, work: Work, megabytes: int = 0):
        """`megabytes`: as `floors.measured_bandwidth` has it."""
        self.work = work
        self.rate = floors.measured_flops(work.dtype)
        self.bandwidth = floors.measured_bandwidth(megabytes)
        self.seconds: dict[str, list[float]] = {}
        self.floor: dict[str, list[float]] = {}
        self.products: dict[str, list[float]] = {}

    def begun(self) -> Phases:
        """An empty table of the same rates."""
        new = copy.copy(self)
        new.seconds, new.floor, new.products = {}, {}, {}
        return new

    def add(self, name: str, seconds: float, work: roofline.Work) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.floor.setdefault(name, []).append(work.seconds(self.rate, self.bandwidth))
        self.products.setdefault(name, []).append(work.flops / self.rate)

    def medians(self, tokens_per_step: float) -> dict[str, Any]:
        """The medians beside their floors, with the memory that was needed."""
        rows = {}
        for name, seconds in self.seconds.items():
            median, least = statistics.median(seconds), statistics.median(self.floor[name])
            products = statistics.median(self.products[name])
            rows[name] = {
                "seconds": median,
                "floor_seconds": least,
                "share": least / median,
                "share_of_products": products / median,
            }
        total = sum(row["seconds"] for row in rows.values())
        return {
            "work": dataclasses.asdict(self.work),
            "environment": environment(),
            "tflops": self.rate / 1e12,
            "gb_per_s": self.bandwidth / 1e9,
            "phases": rows,
            "completion_tokens_per_s": tokens_per_step / total,
            "memory": memory.usage(),
        }


def run(description: str, phases: tuple[str, ...]) -> None:
    """Times the phases of a step and prints them beside their floors."""
    work, args = arguments(description)
    found = measure(work, phases, args.steps)
    print(json.dumps(found["work"]))
    print(f"{found['environment']}")
    print(f"plain product {found['tflops']:.3f} TFLOP/s, copy {found['gb_per_s']:.1f} GB/s")
    print(f"{'phase':<10}{'seconds':>10}{'floor':>10}{'share':>8}{'of products':>13}")
    for name, row in found["phases"].items():
        print(
            f"{name:<10}{row['seconds']:>10.4f}{row['floor_seconds']:>10.4f}"
            f"{row['share']:>8.1%}{row['share_of_products']:>13.1%}"
        )
    print(f"{found['completion_tokens_per_s']:,.0f} completion tokens per second of these phases")
    print(", ".join(f"{name} {gib:.2f}" for name, gib in found["memory"].items()))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def measure(work: Work, phases: tuple[str, ...], steps: int) -> dict[str, Any]:
    """Seconds and floors of the phases of a step, medians of `steps` after two that warm up."""
    step, table = workload.Step(work), Phases(work)
    model = work.shape
    tokens = []
    for n in range(steps + 2):
        rollouts, rollout_s = timed(lambda n=n: step.rollout(n))
        length_PG = rollouts.length_PG
        experience, prepare_s = timed(lambda r=rollouts: step.prepare(r))
        _, update_s = timed(lambda e=experience: step.update(e))
        if n < 2:
            continue
        tokens.append(float(length_PG.sum()))
        forward = roofline.forward(model, rollouts.prompt_length_P, length_PG)
        if "rollout" in phases:
            lengths = rollouts.prompt_length_P, length_PG
            sampling = roofline.rollout(model, *lengths, **step.engine.traffic)
            table.add("rollout", rollout_s, sampling)
        if "prepare" in phases:
            table.add("prepare", prepare_s, forward.times(work.kl))
        if "update" in phases:
            table.add("update", update_s, forward.times(3))
    return table.medians(sum(tokens) / len(tokens))
