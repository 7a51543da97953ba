"""Reads and writes low-rank adapters as PEFT folders: adapter_config.json and its tensors.

Beside the adapters of a reward model stands its head, whole, as PEFT keeps a module of
`modules_to_save`. A folder that asks for more is refused by name: nothing is dropped silently.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from grpo_jax.devices import sharding, transfer
from grpo_jax.messages.values import shown
from grpo_jax.models import lora, parameters
from grpo_jax.models.families import names
from grpo_jax.models.hf.folder import read_json, refuse_odd, some
from grpo_jax.models.hf.targets import ALL_LINEAR, Spec, modules
from grpo_jax.models.hf.tensor import Tensor
from grpo_jax.structs import Adapter, ModelConfig, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SCORE = f"{_PREFIX}score.weight"
# The names under which PEFT looks for the head of a classifier of texts; of a decoder it is score.
_HEADS = ("score", "classifier")

# Settings whose other values would mean more than adapters of dense layers.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (None, [], ()),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "target_parameters": (None, [], ()),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "megatron_config": (None,),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter, and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(folder: Path) -> str:
    """The folder or hub id of the model that an adapter belongs to; ValueError if it names none."""
    file = folder / CONFIG
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{file}: base_model_name_or_path is {shown(base)}. Set it to the folder or hub id of "
            "the model that the adapter belongs to."
        )
    return base


def base_option(folder: Path) -> str:
    """What gives `base_of`, for messages."""
    return f"{folder / CONFIG}: base_model_name_or_path"


def read_config(folder: Path, option: str = "lora.path", *, head: str = "vocabulary") -> Spec:
    """The adapters of a PEFT folder; ValueError if it is none, or asks for more than adapters.

    `head` as in `ModelConfig`: a scalar one may stand beside them.
    """
    file = folder / CONFIG
    if not file.exists():
        raise ValueError(f"{option} = {shown(str(folder))} holds no adapter: no {CONFIG}.")
    refuse_odd(file)
    kept = read_json(file)
    if str(kept.get("peft_type", "")).upper() != "LORA":
        raise ValueError(f"{file}: peft_type is {shown(kept.get('peft_type'))}, not LORA.")
    for name, allowed in _PLAIN.items():
        saved = kept.get(name) if name == "modules_to_save" and head == "scalar" else None
        if isinstance(saved, list) and all(module in _HEADS for module in saved):
            continue
        if name in kept and kept[name] not in allowed:
            raise ValueError(
                f"{file}: {name} = {shown(kept[name])}. Only adapters of dense layers are read, "
                "and the head (score) beside those of a reward model; make one with "
                f"{name} = {shown(allowed[0])}."
            )
    layers = kept.get("layers_to_transform")
    if kept.get("layers_pattern"):
        raise ValueError(f"{file}: layers_pattern = {shown(kept['layers_pattern'])} is not read.")
    try:
        return Spec(
            rank=int(kept["r"]),
            alpha=float(kept["lora_alpha"]),
            stabilized=bool(kept.get("use_rslora", False)),
            targets=_targets(kept["target_modules"]),
            exclude=_targets(kept.get("exclude_modules") or ()),
            ranks={k: int(v) for k, v in (kept.get("rank_pattern") or {}).items()},
            alphas={k: float(v) for k, v in (kept.get("alpha_pattern") or {}).items()},
            layers=None if layers is None else tuple([layers] if type(layers) is int else layers),
            where=str(file),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no configuration of LoRA: {error!r}.") from error


def _targets(given: str | list[str]) -> tuple[str, ...]:
    """Targets: a text is a regular expression, a list has ends of names."""
    if isinstance(given, str):
        return (given if given == ALL_LINEAR else f"(?:{given})",)
    return tuple(str(name) for name in given)


# --- Tensors --------------------------------------------------------------------------------------


class _Matrix(NamedTuple):
    """A tensor of one layer's adapter, or of the scalar head."""

    adapter: Adapter | None  # None: the head
    layer: int
    leaf: str  # "lora_a" or "lora_b"
    shape: tuple[int, int]  # of our matrix; the tensor is its transpose
    columns: tuple[tuple[int, int, Tensor], ...]  # first, last, and their place in the tensor

    def of(self, adapters: Params, config: ModelConfig) -> np.ndarray:
        """The matrix in a tree of adapters in NumPy arrays, a view."""
        if self.adapter is None:
            return adapters["score"]["kernel"]
        stack, turn = parameters.layer_stacks(adapters["layers"], config)[self.layer]
        value = lora.leaf(stack, self.adapter.path)[self.leaf][turn]
        return value[: self.shape[0], : self.shape[1]]


def _tensors(config: ModelConfig) -> dict[str, _Matrix]:
    """The matrices of all adapters, by tensor name."""
    table, found = names.table(config), {}
    adapters = {adapter.path: adapter for adapter in config.lora.adapters}
    for module, (path, parts, layer) in modules(config).items():
        adapter = adapters.get(path)
        if adapter is None or not (rank := adapter.ranks[layer]):
            continue
        (inputs, outputs), first, columns = lora.size_of(config, adapter, layer), 0, []
        for part in parts:
            kernel = table[f"{part}/kernel"]
            last = first + lora.dense_layers(config)[layer][part][1]
            columns.append((first, last, Tensor("", True, begin=kernel.begin, order=kernel.order)))
            first = last
        whole = ((0, rank, Tensor("", True)),)
        for leaf, shape, of in (
            ("lora_a", (inputs, rank), whole),
            ("lora_b", (rank, outputs), tuple(columns)),
        ):
            name = f"{_PREFIX}{module}.lora_{leaf[-1].upper()}.weight"
            found[name] = _Matrix(adapter, layer, leaf, shape, of)
    if config.head == "scalar":
        column = ((0, 1, Tensor("", True)),)
        found[_SCORE] = _Matrix(None, 0, "kernel", (config.width, 1), column)
    return found


def save(folder: Path, adapters: Params, config: ModelConfig, base: str | None = None) -> None:
    """Writes adapters, and the head beside them, as a folder that PEFT loads.

    Only the first process writes. `base`: the name of the model that they belong to.
    """
    host = transfer.to_host(adapters)
    if jax.process_index() != 0:
        return
    written = {}
    for name, matrix in _tensors(config).items():
        value = np.asarray(matrix.of(host, config), np.float32)
        written[name] = np.empty(value.shape[::-1], np.float32)
        for first, last, tensor in matrix.columns:
            tensor.write(value[:, first:last], written[name])
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
    settings = json.dumps(_settings(config, base), indent=2)
    (folder / CONFIG).write_text(settings + "\n", encoding="utf-8")


def _settings(config: ModelConfig, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json; scaling by the root of the rank is folded into alpha."""
    adapters = {adapter.path: adapter for adapter in config.lora.adapters}
    own: dict[str, tuple[int, float]] = {}  # rank and alpha by module
    for name, (path, _, layer) in modules(config).items():
        rank = adapters[path].ranks[layer] if path in adapters else 0
        own[name] = rank, adapters[path].scalings[layer] * rank if rank else 0.0
    by_end = collections.defaultdict(set)
    for name, both in own.items():
        by_end[_end(name)].add(both)
    has = {_end(n) if len(by_end[_end(n)]) == 1 else n: both for n, both in own.items() if both[0]}
    (usual_rank, usual_alpha), _ = collections.Counter(
        both for both in own.values() if both[0]
    ).most_common(1)[0]
    has_head = config.head == "scalar"
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual_rank,
        "lora_alpha": _number(usual_alpha),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(has),
        "exclude_modules": None,
        "rank_pattern": {n: rank for n, (rank, _) in has.items() if rank != usual_rank},
        "alpha_pattern": {n: _number(a) for n, (_, a) in has.items() if a != usual_alpha},
        "layers_to_transform": None,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": ["score"] if has_head else None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def has_head(folder: Path) -> bool:
    """Whether a folder has a scalar head beside its adapters; raises as `load`."""
    with _opened(folder / WEIGHTS) as opened:
        return _SCORE in opened.keys()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The tensors of a file, to be read."""
    if not file.exists():
        raise ValueError(
            f"{file.parent} has no {file.name}; pickles (adapter_model.bin) are not read."
        )
    refuse_odd(file)
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}).") from error


def load(folder: Path, config: ModelConfig, mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """The adapters of a folder, and the scalar head if there is one, laid out over the mesh.

    Raises ValueError if its tensors are not those of `config.lora`, or not finite.
    """
    file = folder / WEIGHTS
    with _opened(file) as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}
    needed = _tensors(config)
    if _SCORE not in found:
        needed.pop(_SCORE, None)
    if found.keys() != needed.keys():
        missing, unused = sorted(needed.keys() - found), sorted(found.keys() - needed)
        told = [f"{what}: {some(n)}" for what, n in (("missing", missing), ("unused", unused)) if n]
        raise ValueError(f"{file} does not hold what {CONFIG} says. Tensors {'; '.join(told)}.")
    shapes, axes = lora.trained_shapes(config), lora.trained_axes(config)
    if _SCORE not in needed:
        shapes, axes = ({"layers": tree["layers"]} for tree in (shapes, axes))
    host = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    for name, matrix in needed.items():
        value = found[name].astype(np.float32)
        if value.shape != matrix.shape[::-1]:
            needs = list(matrix.shape[::-1])
            raise ValueError(f"{file}: {name} is {list(value.shape)}, needed {needs}.")
        if not math.isfinite(np.abs(value).sum()):
            raise ValueError(f"{file}: {name} has values that are NaN or infinite.")
        at, rows = matrix.of(host, config), matrix.shape[0]
        for first, last, tensor in matrix.columns:
            at[:, first:last] = tensor.read(value, ((0, rows), (0, last - first)))
    shardings = sharding.tree_shardings(mesh, axes, host)
    put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i].astype(dtype))  # noqa: E731
    return jax.tree.map(put, host, shardings)
