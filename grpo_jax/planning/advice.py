"""Which change of a config makes it fit, and which mesh is best: found by compiling each."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import config as config_lib
from grpo_jax.planning.step import Plan
from grpo_jax.structs import ModelConfig

Change = dict[str, Any]  # options by their dotted names


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change, and the plan with it or why there is none."""

    change: Change
    plan: Plan | None
    refusal: str = ""

    @property
    def words(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.change.items())


def changed(config: ConfigDict, change: Change) -> ConfigDict:
    """The config with some options changed, checked anew."""
    new = copy.deepcopy(config).unlock()
    for name, value in change.items():
        section, _, leaf = name.rpartition(".")
        new[section][leaf] = value
    config_lib.check(new)
    return new.lock()


def attempt(make: Callable[[ConfigDict], Plan], config: ConfigDict, change: Change) -> Tried:
    """The plan with a change; a combination that the config refuses is told, not raised."""
    try:
        return Tried(change, make(changed(config, change)))
    except ValueError as error:
        return Tried(change, None, str(error))


def smallest_fit(
    make: Callable[[ConfigDict], Plan], config: ConfigDict, plan: Plan, model: ModelConfig
) -> list[Tried]:
    """Changes tried one after the other until one fits; the last one does, or none does.

    Those that cost least come first: what changes nothing of the result (smaller microbatches, more
    computed again, fewer slots at once), then meshes that split the weights further.
    """
    tried = []
    for change in _smaller(config, plan, model):
        tried.append(attempt(make, config, change))
        if tried[-1].plan is not None and tried[-1].plan.fits:
            break
    return tried


def _smaller(config: ConfigDict, plan: Plan, model: ModelConfig) -> Iterator[Change]:
    over = {p.phase for p in plan.programs if p.peak > plan.room}
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    change: Change = {}
    if "update" in over:
        groups = config_lib.groups_at_once(config)
        if groups > shards:
            change["batch.microbatch"] = shards
            yield dict(change)
        if config.model.remat != "full":
            change["model.remat"] = "full"
            yield dict(change)
    if "rollout" in over:
        at_once = config.rollout.num_slots or config.batch.prompts * config.batch.group
        for part in (2, 4):
            if at_once % (part * shards) == 0:
                yield change | {"rollout.num_slots": at_once // part}
    for mesh in meshes(config, plan, model):
        if mesh["mesh.tensor"] >= plan.mesh["tensor"] and mesh["mesh.fsdp"] >= plan.mesh["fsdp"]:
            rows = mesh["mesh.data"] * mesh["mesh.fsdp"]
            smaller = {"batch.microbatch": rows} if "batch.microbatch" in change else {}
            yield change | smaller | mesh


def meshes(config: ConfigDict, plan: Plan, model: ModelConfig) -> list[Change]:
    """Other meshes of the same devices over which the config's groups and the heads split.

    Those that hold most copies of the weights come first.
    """
    found, sequence = [], plan.mesh["sequence"]
    devices = math.prod(plan.mesh.values()) // sequence
    for tensor in _powers(min(devices, model.num_heads)):
        if model.num_heads % tensor or devices % tensor:
            continue
        for fsdp in _powers(devices // tensor):
            data = devices // tensor // fsdp
            own = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
            splits = data * fsdp * tensor == devices
            groups = config.batch.prompts // config.batch.minibatches
            if splits and groups % (data * fsdp) == 0 and own != plan.mesh:
                found.append({f"mesh.{name}": size for name, size in own.items()})
    return sorted(found, key=lambda m: (m["mesh.tensor"], m["mesh.fsdp"]))


def _powers(most: int) -> Iterator[int]:
    n = 1
    while n <= most:
        yield n
        n *= 2


def search(
    make: Callable[[ConfigDict], Plan],
    lower_bound: Callable[[ConfigDict], float],
    config: ConfigDict,
    plan: Plan,
    model: ModelConfig,
    most: int,
) -> list[Tried]:
    """Up to `most` other meshes, compiled and ranked: those that fit first, then by least seconds.

    Meshes whose arrays alone (`lower_bound`, bytes) do not fit are left out without compiling.
    """
    tried = [Tried({f"mesh.{name}": size for name, size in plan.mesh.items()}, plan)]
    for mesh in meshes(config, plan, model):
        rows = mesh["mesh.data"] * mesh["mesh.fsdp"]
        if config.batch.microbatch > 0 and config.batch.microbatch % rows:
            mesh |= {"batch.microbatch": rows}
        if len(tried) > most:
            break
        if lower_bound(changed(config, mesh)) <= plan.room:
            tried.append(attempt(make, config, mesh))
    rank = lambda t: (not t.plan.fits, t.plan.step_s, t.plan.peak)  # noqa: E731
    return sorted((t for t in tried if t.plan is not None), key=rank)
