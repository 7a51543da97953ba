"""What a compiled program needs and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from grpo_jax.devices.compiling import Call
from grpo_jax.planning import hlo
from grpo_jax.planning.topologies import Chip


@dataclasses.dataclass(frozen=True)
class Program:
    """A program with the arguments it gets in a step, and what is held besides them."""

    name: str
    phase: str
    call: Call
    runs: int  # in a step
    loops: float  # how often a loop that ends by what it computes runs
    beside: float  # bytes on each device, besides its arguments, while it runs
    read: Mapping[tuple[int, ...], float]  # as `hlo.cost` has it

    @staticmethod
    def of(
        call: Call,
        phase: str,
        held: Any,
        prefix: str = "",
        runs: int = 1,
        loops: float = 1.0,
        read: Mapping[tuple[int, ...], float] = MappingProxyType({}),
    ) -> Program:
        """`held`: arrays by shape that lie on the devices while it runs, its arguments or not."""
        beside = bytes_per_device(held, but=call.args)
        return Program(prefix + call.name, phase, call, runs, loops, beside, read)


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


def bytes_per_device(tree: Any, but: Any = ()) -> float:
    """Bytes that a device holds of arrays given by shape and sharding.

    Each array counts once, and those that `but` has too do not.
    """
    others = {id(x) for x in jax.tree.leaves(but)}
    arrays = {id(x): x for x in jax.tree.leaves(tree) if id(x) not in others}
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays.values())
    )


# Programs by what they are compiled from: a change of the config seldom changes all of a step's.
Known = dict[str, Compiled]
