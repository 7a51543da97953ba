"""Which change of a config makes it fit, and which mesh is best: found by compiling each."""

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

Change = dict[str, Any]  # options by their dotted names

# Programs that draw completions; fewer slots make all of them smaller.
_ROLLOUT = {"admit", "decode"}
_PACKED = {"score policy", "score reference", "gradient"}  # in microbatches
_DRAWING = {f"{of}{name}" for of in ("", "evaluation ", "samples ") for name in _ROLLOUT}


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change, and the plan with it or why there is none."""

    change: Change
    plan: Plan | None
    arrays: float = math.inf  # bytes that a device needs for arrays alone; inf: not known
    refusal: str = ""

    @property
    def words(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.change.items()) or "as it is"

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def tokens(self) -> int:
        """Of a completion, where the change says how many."""
        return self.change["rollout.max_tokens"]

    @property
    def over(self) -> set[str]:
        """Names of the programs that do not fit; of all where nothing was compiled."""
        if self.plan is None:
            return {"publish_layer", *_DRAWING, *_PACKED, "optimizer_step"}
        return {p.name for p in self.plan.programs if p.peak > self.plan.room}

    @property
    def lack(self) -> tuple[float, float]:
        """How far it is from fitting: bytes over the limit in all programs, and those of arrays."""
        if self.plan is None:
            return math.inf, self.arrays
        return sum(max(p.peak - self.plan.room, 0.0) for p in self.plan.programs), self.arrays


def changed(config: ConfigDict, change: Change) -> ConfigDict:
    """The config with some options changed, checked anew."""
    new = copy.deepcopy(config).unlock()
    for name, value in change.items():
        section, _, leaf = name.rpartition(".")
        new[section][leaf] = value
    rules.check(new)
    return new.lock()


@dataclasses.dataclass(frozen=True)
class Trial:
    """Tries changes of a config of a model on devices, whose memory has `room`."""

    config: ConfigDict
    model: ModelConfig
    make: Callable[[ConfigDict], Plan]
    held: Callable[[ConfigDict], dict[str, float]]  # bytes of arrays by what they hold
    room: float

    def of(self, change: Change) -> Tried:
        """The plan with a change; a combination that the config refuses is told, not raised.

        Nothing is compiled where the arrays alone do not fit.
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
    """Changes tried one after the other until one fits: the last that does is the smallest found.

    Those that cost least come first: what changes nothing of the result (smaller microbatches, more
    computed again, fewer slots at once, state in the host's memory), then meshes that split the
    weights further, and again the first ones on the best of these. What changes the numbers of a
    run comes last, the least first. What helps nothing is left out of what follows, and in the end
    what the others make needless.
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
    """The change without what it can do without; those in `known` are not tried again."""
    for name in fitting.change:
        fewer = {n: v for n, v in fitting.change.items() if n != name}
        if fewer and not name.startswith("mesh.") and fewer not in known:
            tried = trial.of(fewer)
            yield tried
            fitting = tried if tried.fits else fitting


# What may help, in the order in which it is tried: of a config, by names of the programs that do
# not fit and by what devices hold.
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
    """Meshes that split the rollout's weights as far as now, and the learner's.

    Those with fewer shards of rows allow smaller microbatches, which are tried with them.
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
    if over & _ROLLOUT:  # an evaluation is exact
        for part in ("kv_cache_dtype", "weights_dtype"):
            if config.rollout[part] != "int8":
                yield {f"rollout.{part}": "int8"}
    if config.model.param_dtype != "bfloat16":
        yield {"model.param_dtype": "bfloat16"}


def mesh_options(sizes: dict[str, int]) -> Change:
    return {f"mesh.{name}": size for name, size in sizes.items()}


def meshes(config: ConfigDict, model: ModelConfig) -> list[Change]:
    """Other meshes of the same devices over which the config's groups and the MLPs split.

    Those that hold most copies of the weights come first. `config.mesh` has no -1. Microbatches
    that do not split over a mesh become the smallest that do.
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
    """Up to `most` other meshes, compiled; those whose arrays alone do not fit are left out."""
    tries = map(trial.of, meshes(trial.config, trial.model))
    yield from itertools.islice((t for t in tries if t.plan is not None), most)


def longest(trial: Trial, plan: Plan, most: int) -> Iterator[Tried]:
    """Completions up to `most` tokens, to within an eighth of the longest for which the step fits.

    From the config's own on twice as long until it does not fit, or half as long until it does;
    then between the two.
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
    """The best first: those that fit, then by least seconds a step."""
    return sorted(tries, key=lambda t: (not t.fits, t.plan.step_s, t.plan.peak))
