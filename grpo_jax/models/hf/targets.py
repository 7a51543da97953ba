"""Chooses the dense layers that get low-rank adapters, and the ranks, by PEFT's rules."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from grpo_jax.messages.values import shown
from grpo_jax.models import lora
from grpo_jax.models.families import names
from grpo_jax.models.hf.folder import some
from grpo_jax.structs import Adapter, Lora, ModelConfig

ALL_LINEAR = "all-linear"  # all dense layers but the head


@dataclasses.dataclass(frozen=True)
class Spec:
    """The requested adapters, by the module names of the Hugging Face model.

    A target of letters, digits, `_` and `.` only is the end of names, such as "q_proj" or
    "mlp.up_proj"; any other is a regular expression that must match a whole name.
    """

    rank: int
    alpha: float
    stabilized: bool = False  # scaled by alpha / sqrt(rank): rsLoRA (arXiv:2312.03732)
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by the end of names
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] | None = None  # None: all
    where: str = "lora"  # the option or file that asks for them

    def scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.stabilized else rank)


class Module(NamedTuple):
    """A linear module of the Hugging Face model; several dense layers, if they share its tensor."""

    path: str  # as in `Adapter`
    parts: tuple[str, ...]  # the paths of its dense layers, in the order of the tensor's rows
    layer: int


def modules(config: ModelConfig) -> dict[str, Module]:
    """The linear modules of the decoder's layers, by name."""
    table, found = names.table(config), {}
    for layer, paths in enumerate(lora.dense_layers(config)):
        of_module = collections.defaultdict(list)
        for path in sorted(paths, key=lambda path: table[f"{path}/kernel"].begin):
            tensor = table[f"{path}/kernel"].of_layer(layer)
            of_module[tensor.name.removesuffix(".weight")].append(path)
        for name, parts in of_module.items():
            outer = parts[0].rpartition("/")[0]
            path = f"{outer}/{'_'.join(part.rpartition('/')[2] for part in parts)}"
            found[name] = Module(path, tuple(parts), layer)
    return found


def lora_of(config: ModelConfig, spec: Spec, *, base: str = "auto") -> Lora:
    """The requested adapters; ValueError for a target that cannot have one or does not exist.

    `base` as in `Lora`.
    """
    found = modules(config)
    taken = {name for target in spec.targets for name in _taken(config, spec, target, found)}
    taken -= {name for target in spec.exclude for name in found if _matches(target, name)}
    if spec.layers is not None:
        taken = {name for name in taken if found[name].layer in spec.layers}
    if not taken:
        raise ValueError(f"{spec.where}: no layer is left to have an adapter.")
    for pattern in (*spec.ranks, *spec.alphas):
        if not any(_is_of(pattern, name) for name in taken):
            raise ValueError(
                f"{spec.where}: the pattern {shown(pattern)} of a rank or alpha matches no module "
                f"that has an adapter, such as {some(sorted(taken))}."
            )
    ranks: dict[str, list[int]] = collections.defaultdict(lambda: [0] * config.num_layers)
    scalings: dict[str, list[float]] = collections.defaultdict(lambda: [0.0] * config.num_layers)
    parts = {}
    for name, module in found.items():
        if name in taken:
            path, layer = module.path, module.layer
            rank, alpha = _own(spec.ranks, name, spec.rank), _own(spec.alphas, name, spec.alpha)
            ranks[path][layer], scalings[path][layer] = rank, spec.scaling(rank, alpha)
            parts[path] = module.parts
    return Lora(
        tuple(Adapter(p, parts[p], tuple(ranks[p]), tuple(scalings[p])) for p in sorted(parts)),
        base,
    )


def _taken(config: ModelConfig, spec: Spec, target: str, found: Iterable[str]) -> list[str]:
    """The names of modules that a target matches."""
    if target == ALL_LINEAR:
        return list(found)
    table = names.table(config)
    for path, what in (("head/kernel", "head"), ("embed/embedding", "embedding")):
        name = table[path].name.removesuffix(".weight")
        if _matches(target, name):
            raise ValueError(
                f"{spec.where}: {shown(target)} names {name}, the {what}, which can have no "
                "adapter: log-probabilities are computed chunk by chunk from the plain matrix, and "
                "a tied model has one for both. Leave it out."
            )
    if config.head == "scalar" and _matches(target, "score"):
        raise ValueError(
            f"{spec.where}: {shown(target)} names score, the head of a reward model, which is "
            "trained whole beside the adapters. Leave it out."
        )
    taken = [name for name in found if _matches(target, name)]
    if not taken:
        ends = sorted({name.rpartition(".")[2] for name in found})
        raise ValueError(
            f"{spec.where}: {shown(target)} names no dense layer of this {config.family} model. "
            f"It has {', '.join(ends)}, such as {next(iter(found))}; {ALL_LINEAR} takes all."
        )
    return taken


def _matches(target: str, name: str) -> bool:
    if re.fullmatch(r"[\w.]+", target):
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ValueError(f"lora: {shown(target)} is no regular expression: {error}.") from error


def _is_of(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name, as in PEFT's `get_pattern_key`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _own(patterns: Mapping[str, float], name: str, usual: float) -> float:
    return next((value for pattern, value in patterns.items() if _is_of(pattern, name)), usual)
