"""What a compiled program needs and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from grpo_jax.planning import hlo
from grpo_jax.planning.topologies import Chip


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the arguments it gets in a step."""

    name: str
    phase: str
    lower: Callable[[], Any]
    runs: int  # in a step
    loops: float  # how often a loop that ends by what it computes runs
    beside: float  # bytes on each device, besides its arguments, while it runs
    # As `hlo.cost` has it
    read: Mapping[tuple[int, ...], float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one program needs and costs on each device; costs are those of all its runs in a step.

    Raised by the compiler for want of memory: `error`, and nothing is known but `beside`.
    """

    name: str
    phase: str
    runs: int
    beside: float  # bytes
    arguments: float
    results: float  # that do not lie in an argument's place
    temporary: float
    cost: hlo.Cost
    compile_s: float
    error: str = ""

    @property
    def peak(self) -> float:
        """Bytes on a device while it runs."""
        total = self.beside + self.arguments + self.results + self.temporary
        return math.inf if self.error else total

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The least time by each of the chip's rates, and other estimates.

        "in turn": arithmetic and memory where one kernel follows another, as on a GPU, and products
        wait for what is sent and not hidden by others; "compiler": by the compiler's estimate of
        cycles, of a TPU.

        Every axis of the mesh is taken to have one dimension of a TPU's torus to itself.
        """
        if chip.flops is None:
            return {}
        by_axes: dict[tuple[str, ...], float] = {}
        for (_, axes), sent in self.cost.sent.items():
            by_axes[axes] = by_axes.get(axes, 0.0) + sent
        seconds = {
            "compute": self.cost.flops / chip.flops,
            "memory": self.cost.bytes / chip.bandwidth,
            "network": sum(by_axes.values()) / chip.link,
            "in turn": self.cost.in_turn(chip.flops, chip.bandwidth)
            + math.fsum(self.cost.waited(chip.flops, chip.link).values()),
        }
        return seconds | ({"compiler": self.cost.cycles / chip.clock} if chip.clock else {})


def bytes_per_device(tree: Any) -> float:
    """Bytes that a device holds of arrays given by shape and sharding."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


# Programs by what they are compiled from: a change of the config seldom changes all of a step's.
Known = dict[str, Compiled]
