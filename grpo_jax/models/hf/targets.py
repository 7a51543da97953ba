"""Chooses the dense layers that get low-rank adapters, and the ranks, by PEFT's rules."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

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


def module_names(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Path and layer number of each dense layer, by module name."""
    table, found = names.table(config), {}
    for layer, paths in enumerate(lora.dense_layers(config)):
        for path in paths:
            tensor = table[f"{path}/kernel"].of_layer(layer)
            found[tensor.name.removesuffix(".weight")] = path, layer
    return found


def lora_of(config: ModelConfig, spec: Spec, *, base: str = "auto") -> Lora:
    """The requested adapters; ValueError for a target that cannot have one or does not exist.

    `base` as in `Lora`.
    """
    modules = module_names(config)
    _refuse_shared(config, spec)
    taken = {name for target in spec.targets for name in _taken(config, spec, target, modules)}
    taken -= {name for target in spec.exclude for name in modules if _matches(target, name)}
    if spec.layers is not None:
        taken = {name for name in taken if modules[name][1] in spec.layers}
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
    for name, (path, layer) in modules.items():
        if name in taken:
            rank, alpha = _own(spec.ranks, name, spec.rank), _own(spec.alphas, name, spec.alpha)
            ranks[path][layer], scalings[path][layer] = rank, spec.scaling(rank, alpha)
    adapters = (Adapter(path, tuple(ranks[path]), tuple(scalings[path])) for path in ranks)
    return Lora(tuple(adapters), base)


def _taken(
    config: ModelConfig, spec: Spec, target: str, modules: Mapping[str, tuple[str, int]]
) -> list[str]:
    """The modules that a target matches."""
    if target == ALL_LINEAR:
        return list(modules)
    table = names.table(config)
    for path, what in (("head/kernel", "head"), ("embed/embedding", "embedding")):
        name = table[path].name.removesuffix(".weight")
        if _matches(target, name):
            raise ValueError(
                f"{spec.where}: {shown(target)} names {name}, the {what}, which can have no "
                "adapter: log-probabilities are computed chunk by chunk from the plain matrix, and "
                "a tied model has one for both. Leave it out."
            )
    found = [name for name in modules if _matches(target, name)]
    if not found:
        ends = sorted({name.rpartition(".")[2] for name in modules})
        raise ValueError(
            f"{spec.where}: {shown(target)} names no dense layer of this {config.family} model. "
            f"It has {', '.join(ends)}, such as {next(iter(modules))}; {ALL_LINEAR} takes all."
        )
    return found


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


def _refuse_shared(config: ModelConfig, spec: Spec) -> None:
    """Raises ValueError if several adapted dense layers share one tensor in the family's files."""
    table = names.table(config)
    found = [
        table[f"{path}/kernel"].name for path in {p for d in lora.dense_layers(config) for p in d}
    ]
    shared = sorted(name for name, number in collections.Counter(found).items() if number > 1)
    if shared:
        raise ValueError(
            f"{spec.where}: {config.family} keeps several dense layers in one tensor "
            f"({some(shared)}), which adapters are not made for yet."
        )
