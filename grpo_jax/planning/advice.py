"""Searches changes of a config that make it fit, and the best mesh, by compiling each candidate."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.config import derived, rules
from grpo_jax.planning import plan as plan_lib
from grpo_jax.planning.plan import Plan
from grpo_jax.structs import ModelConfig

Change = dict[str, Any]  # new values of options, by dotted name

# Programs that sample completions; fewer slots make all of them smaller.
_ROLLOUT = {"admit", "decode"}
_PACKED = {"score policy", "score reference", "gradient"}  # in microbatches
_DRAWING = {f"{of}{name}" for of in ("", "evaluation ", "samples ") for name in _ROLLOUT}


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change, with its plan or the reason why there is none."""

    change: Change
    plan: Plan | None
    arrays: float = math.inf  # bytes that a device needs for arrays alone; inf: unknown
    refusal: str = ""

    @property
    def words(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.change.items()) or "as it is"

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def tokens(self) -> int:
        """The change's `rollout.max_tokens`."""
        return self.change["rollout.max_tokens"]

    @property
    def over(self) -> set[str]:
        """Names of the programs that do not fit; of all programs if nothing was compiled."""
        if self.plan is None:
            return {"publish_layer", *_DRAWING, *_PACKED, "optimizer_step"}
        return {p.name for p in self.plan.programs if p.peak > self.plan.room}

    @property
    def lack(self) -> tuple[float, float]:
        """Distance from fitting: bytes over the limit, summed over programs; bytes of arrays."""
        if self.plan is None:
            return math.inf, self.arrays
        return sum(max(p.peak - self.plan.room, 0.0) for p in self.plan.programs), self.arrays


def changed(config: ConfigDict, change: Change) -> ConfigDict:
    """The config with some options changed, and checked again."""
    new = copy.deepcopy(config).unlock()
    for name, value in change.items():
        section, _, leaf = name.rpartition(".")
        new[section][leaf] = value
    rules.check(new)
    return new.lock()


@dataclasses.dataclass(frozen=True)
class Trial:
    """Tries changes of a config, for a model and for devices with `room` bytes of usable memory."""

    config: ConfigDict
    model: ModelConfig
    make: Callable[[ConfigDict], Plan]
    held: Callable[[ConfigDict], dict[str, float]]  # bytes of arrays, by their content
    room: float

    def of(self, change: Change) -> Tried:
        """The plan with a change; if the config refuses it, the result holds the refusal.

        It compiles nothing if the arrays alone do not fit.
        """
        try:
            config = changed(self.config, change)
            arrays = plan_lib.arrays_alone(self.held(config))
            if arrays > self.room:
                why = f"its arrays alone take {arrays / 2**30:,.2f} GiB"
                return Tried(change, None, arrays, why)
            return Tried(change, self.make(config), arrays)
        except ValueError as error:
            return Tried(change, None, refusal=str(error))


def smallest_fit(trial: Trial, plan: Plan) -> Iterator[Tried]:
    """Tries changes one by one until one fits; the last that fits is the smallest found.

    The cheapest changes come first: those that keep the result (smaller microbatches, more
    recomputation, fewer slots at once, state in host memory). Then come meshes that split the
    weights further, and the first changes again on the best of these meshes. Changes of a run's
    numerics come last, the smallest first. A change that does not help is not combined with later
    ones. At the end, changes that the others make needless are removed.
    """
    best = Tried({}, plan, plan_lib.arrays_alone(plan.held))
    tries: list[Change] = []
    for stage in (_exact, _on_meshes, _exact, _rounded):
        seen: list[Change] = []
        start = best
        while True:
            base = start if stage is _on_meshes else best  # one mesh replaces the other
            config = changed(trial.config, base.change)
            possible = stage(config, base.over, trial.held(config), trial.model)
            change = next((c for c in possible if c not in seen), None)
            if change is None:
                break
            seen.append(change)
            tried = trial.of(base.change | change)
            tries.append(tried.change)
            yield tried
            if tried.fits:
                yield from _without_each(trial, tried, tries)
                return
            best = min(best, tried, key=lambda t: t.lack)


def _without_each(trial: Trial, fitting: Tried, known: list[Change]) -> Iterator[Tried]:
    """Tries the change without each of its options; changes in `known` are not tried again."""
    for name in fitting.change:
        fewer = {n: v for n, v in fitting.change.items() if n != name}
        if fewer and not name.startswith("mesh.") and fewer not in known:
            tried = trial.of(fewer)
            yield tried
            fitting = tried if tried.fits else fitting


# Each stage yields changes that may help, in the order in which they are tried, from the config,
# the names of programs that do not fit (`over`) and the bytes of arrays (`held`).
def _exact(
    config: ConfigDict, over: set[str], held: dict[str, float], model: ModelConfig
) -> Iterator[Change]:
    shards = config.mesh.data * config.mesh.fsdp
    if over & _PACKED and derived.groups_at_once(config) > shards:
        yield {"batch.microbatch": shards}
    if "gradient" in over and config.model.remat != "full":
        yield {"model.remat": "full"}
    if over & _DRAWING:
        whole = config.batch.prompts * config.batch.group
        half, uneven = divmod(config.rollout.num_slots or whole, 2)
        if not uneven and half % shards == 0 and 4 * half >= whole:
            yield {"rollout.num_slots": half}
    if over - {"optimizer_step"} and held["optimizer"]:
        yield {"optim.offload": True}
    if over - {"score reference"} and held["reference"]:
        yield {"model.offload_reference": True}


def _on_meshes(
    config: ConfigDict, over: set[str], held: dict[str, float], model: ModelConfig
) -> Iterator[Change]:
    """Meshes that split the rollout's weights and the learner's at least as far as now.

    Meshes with fewer row shards allow smaller microbatches, which are tried with them.
    """
    tensor, learner = config.mesh.tensor, config.mesh.tensor * config.mesh.fsdp
    for mesh in meshes(config, model):
        if mesh["mesh.tensor"] < tensor or mesh["mesh.tensor"] * mesh["mesh.fsdp"] < learner:
            continue
        yield mesh
        shards = mesh["mesh.data"] * mesh["mesh.fsdp"]
        if over & _PACKED and derived.groups_at_once(config) > shards:
            yield mesh | {"batch.microbatch": shards}


def _rounded(
    config: ConfigDict, over: set[str], held: dict[str, float], model: ModelConfig
) -> Iterator[Change]:
    if held["optimizer"] or "optimizer_step" in over:
        fewer = {"float32": ("bfloat16", "int8"), "bfloat16": ("int8",), "int8": ()}
        for kind in fewer[config.optim.moments_dtype]:
            yield {"optim.moments_dtype": kind}
    if over & _ROLLOUT:  # evaluations do not use int8
        for part in ("kv_cache_dtype", "weights_dtype"):
            if config.rollout[part] != "int8":
                yield {f"rollout.{part}": "int8"}
    if config.model.param_dtype != "bfloat16":
        yield {"model.param_dtype": "bfloat16"}


def mesh_options(sizes: dict[str, int]) -> Change:
    return {f"mesh.{name}": size for name, size in sizes.items()}


def meshes(config: ConfigDict, model: ModelConfig) -> list[Change]:
    """Other meshes of the same devices that divide the config's groups and the MLP width.

    Meshes with the most copies of the weights come first. `config.mesh` must have no -1. If a mesh
    does not divide the microbatch, the change sets the smallest microbatch that it divides.
    """
    found, sequence = [], config.mesh.sequence
    devices = math.prod(config.mesh.values()) // sequence
    for tensor in _powers(min(devices, model.num_heads)):
        if model.mlp_width % tensor or devices % tensor:
            continue
        if sequence > 1 and model.num_heads % (sequence * tensor):
            continue
        for fsdp in _powers(devices // tensor):
            data = devices // tensor // fsdp
            own = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
            splits = data * fsdp * tensor == devices
            groups = config.batch.prompts // config.batch.minibatches
            if splits and groups % (data * fsdp) == 0 and own != dict(config.mesh):
                smaller = {}
                if config.batch.microbatch > 0 and config.batch.microbatch % (data * fsdp):
                    smaller = {"batch.microbatch": data * fsdp}
                found.append(mesh_options(own) | smaller)
    return sorted(found, key=lambda m: (m["mesh.tensor"], m["mesh.fsdp"]))


def _powers(most: int) -> Iterator[int]:
    n = 1
    while n <= most:
        yield n
        n *= 2


def search(trial: Trial, most: int) -> Iterator[Tried]:
    """Tries up to `most` other meshes, except those whose arrays alone do not fit."""
    tries = map(trial.of, meshes(trial.config, trial.model))
    yield from itertools.islice((t for t in tries if t.plan is not None), most)


def longest(trial: Trial, plan: Plan, most: int) -> Iterator[Tried]:
    """Searches the longest completions for which the step fits, up to `most` tokens, to an eighth.

    It begins at the config's length and doubles it until the step does not fit, or halves it until
    it does; then it bisects.
    """
    tokens = trial.config.rollout.max_tokens
    fits, fails = (tokens, math.inf) if plan.fits else (0, tokens)
    while fails - fits > max(fits // 8, 1):
        longer = min(2 * fits, most) if fails == math.inf else int(fits + fails) // 2
        if longer in (0, fits):
            return
        tried = trial.of({"rollout.max_tokens": longer})
        yield tried
        fits, fails = (longer, fails) if tried.fits else (fits, longer)


def ranked(tries: Iterable[Tried]) -> list[Tried]:
    """Sorted, the best first: those that fit, then by least seconds per step."""
    return sorted(tries, key=lambda t: (not t.fits, t.plan.step_s, t.plan.peak))
