"""A compiled program's memory and cost."""

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
    """A program with its arguments in a step, and the bytes of other arrays that exist then."""

    name: str
    phase: str
    call: Call
    runs: int  # in a step
    loops: float  # iterations of a loop whose end depends on data
    beside: float  # bytes of other arrays on each device while it runs
    read: Mapping[tuple[int, ...], float]  # see `hlo.cost`

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
        """`held`: shapes of arrays on the devices while it runs, with or without its arguments."""
        beside = bytes_per_device(held, but=call.args)
        return Program(prefix + call.name, phase, call, runs, loops, beside, read)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program's memory and cost on each device; the cost is for all its runs in a step.

    If the compiler ran out of memory, `error` says so and only `beside` is known.
    """

    name: str
    phase: str
    runs: int
    beside: float  # bytes
    arguments: float
    results: float  # without those in an argument's memory
    temporary: float
    cost: hlo.Cost
    compile_s: float
    error: str = ""

    @property
    def peak(self) -> float:
        """Bytes in use on a device while it runs."""
        total = self.beside + self.arguments + self.results + self.temporary
        return math.inf if self.error else total

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Lower bounds on its seconds, by each of the chip's rates, and two estimates.

        "in turn": kernels run one after the other, as on a GPU, and collectives that no matrix
        product hides add their time. "compiler": the TPU compiler's estimate of cycles.

        Each mesh axis is assumed to have one dimension of a TPU's torus for itself.
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
    """Bytes on one device of arrays, given by shape and sharding.

    Each array counts once; arrays that are also in `but` do not count.
    """
    others = {id(x) for x in jax.tree.leaves(but)}
    arrays = {id(x): x for x in jax.tree.leaves(tree) if id(x) not in others}
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays.values())
    )


# Compiled programs, by a hash of their source: a config change seldom changes all of them.
Known = dict[str, Compiled]
