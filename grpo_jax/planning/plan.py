"""The plan of a step: memory, traffic and least time of its programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from grpo_jax.devices import sharding
from grpo_jax.planning import hlo
from grpo_jax.planning.compiled import Compiled, Known
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.programs import Step
from grpo_jax.planning.topologies import Chip
from grpo_jax.setup.learner import DEFAULT, MemoryPlan
from grpo_jax.structs import ModelConfig


def arrays_alone(held: dict[str, float]) -> float:
    """The least bytes that arrays take on a device, without the programs' own memory."""
    always = held["weights"] + held["optimizer"] + held["reference"]
    sampling = max(held["rollout weights"] + held["cache"], held["evaluation"])
    always += held.get("teacher", 0.0) + held.get("reward models", 0.0)
    return always + max(sampling, held["gradients"])


# --- Together -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and cost of one step of a config, on each device of a topology."""

    topology: str
    chip: Chip
    mesh: dict[str, int]
    num_params: int
    held: dict[str, float]  # bytes
    programs: list[Compiled]

    @property
    def peak(self) -> float:
        return max(p.peak for p in self.programs)

    @property
    def room(self) -> float:
        """Bytes that programs may use on a device."""
        return math.inf if self.chip.usable is None else self.chip.usable

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def activations(self) -> float:
        return max(p.temporary for p in self.programs)

    @property
    def cost(self) -> hlo.Cost:
        return sum((p.cost for p in self.programs), hlo.Cost())

    @property
    def step_s(self) -> float:
        """A lower bound on a step's seconds: the sum of each program's slowest resource."""
        return sum(bound(p.seconds(self.chip))[1] for p in self.programs)

    @property
    def waited(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """A lower bound on a step's seconds of exposed communication, by kind and axes."""
        return self.cost.waited(self.chip.flops, self.chip.link) if self.chip.flops else {}

    @property
    def in_turn_s(self) -> float:
        """A lower bound on a step's seconds if kernels run in turn, with exposed communication."""
        return sum(p.seconds(self.chip).get("in turn", 0.0) for p in self.programs)

    def as_json(self) -> dict[str, Any]:
        number = lambda x: x if math.isfinite(x) else None  # noqa: E731
        programs = []
        for p in self.programs:
            programs.append(
                {
                    "name": p.name,
                    "phase": p.phase,
                    "runs": p.runs,
                    "peak_bytes": number(p.peak),
                    "argument_bytes": p.arguments,
                    "temporary_bytes": p.temporary,
                    "flops": p.cost.flops,
                    "bytes": p.cost.bytes,
                    "sent_bytes": hlo.as_json(p.cost.sent),
                    "seconds": p.seconds(self.chip),
                    "bound": bound(p.seconds(self.chip))[0],
                    "compile_s": round(p.compile_s, 1),
                    "error": p.error,
                }
            )
        return {
            "topology": self.topology,
            "chip": dataclasses.asdict(self.chip),
            "mesh": self.mesh,
            "parameters": self.num_params,
            "fits": self.fits,
            "peak_bytes": number(self.peak),
            "usable_bytes": number(self.room),
            "bytes_per_device": self.held | {"activations": self.activations},
            "flops": self.cost.flops,
            "bytes": self.cost.bytes,
            "sent_bytes": hlo.as_json(self.cost.sent),
            "waited_s": hlo.as_json(self.waited),
            "step_s": self.step_s if self.chip.flops else None,
            "in_turn_s": self.in_turn_s if self.chip.flops else None,
            "programs": programs,
        }


def bound(seconds: dict[str, float]) -> tuple[str, float]:
    """The resource that bounds a program, and its seconds."""
    resources = {name: s for name, s in seconds.items() if name in ("compute", "memory", "network")}
    return max(resources.items(), key=lambda item: item[1], default=("", 0.0))


def plan(
    config: ConfigDict,
    model: ModelConfig,
    topology: str,
    chip: Chip,
    devices: list[jax.Device],
    lengths: Lengths,
    fit: MemoryPlan = DEFAULT,
    *,
    known: Known | None = None,
    only: Callable[[str], bool] = lambda name: True,
) -> Plan:
    """The plan of a config's step on the devices; ValueError if mesh or batch do not fit them."""
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    step = Step(config, model, mesh, lengths, fit, known=known)
    shape = dict(mesh.shape)
    held, programs = step.held(), step.compile(only)
    return Plan(topology, chip, shape, model.num_params, held, programs)
