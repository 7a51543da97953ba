"""The trained weights of a decoder: all of its parameters, or low-rank adapters (LoRA).

Adapters are a separate tree. Gradients, moments and checkpoints have only that tree, stacked by
layer like the parameters (`layer_runs.py`):

    layers/ (stacked by slot) attention/q/lora_a [in, r]    attention/q/lora_b [r, out]

An adapter of several dense layers (`Adapter.parts`) has one A, and B for the outputs of all. The
scalar head of a reward model is trained whole, in the same tree: its input is what adapters change.

    score/kernel [D, 1]

`attached` puts them beside the frozen parameters as `dense.Adapted` kernels; scoring, training and
sampling read that tree. If the layers of a stack have different ranks, all get the largest rank;
the scaling of the rest is 0, and so is its gradient.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.kernels import dense, nf4, quantize
from grpo_jax.kernels.dense import Adapted
from grpo_jax.models import layer_runs, parameters
from grpo_jax.structs import Adapter, Array, ModelConfig, Params

Tree = dict[str, Any]

_WHOLE = ("score",)  # the parts of a decoder that are trained whole beside adapters


@struct.dataclass
class Weights:
    """A decoder's weights in two trees, trained and frozen, and those of its teacher."""

    trained: Params
    frozen: Params | None = None  # None: all learn
    teacher: Params | None = None  # None: the loss reads none

    def whole(self, config: ModelConfig) -> Params:
        """The tree that the network reads."""
        return attached(self.frozen, self.trained, config)


# --- The adapters ---------------------------------------------------------------------------------


@functools.cache
def dense_layers(config: ModelConfig) -> tuple[dict[str, tuple[int, int]], ...]:
    """The dense layers of each decoder layer: (inputs, outputs) by path."""
    found: list[dict[str, tuple[int, int]]] = []
    layers = parameters.param_shapes(config)["layers"]
    for stack, _ in parameters.layer_stacks(layers, config):
        leaves, _ = jax.tree_util.tree_flatten_with_path(stack)
        kernels = [(path[:-1], x) for path, x in leaves if path[-1].key == "kernel"]
        found.append({"/".join(key.key for key in path): x.shape[-2:] for path, x in kernels})
    return tuple(found)


def size_of(config: ModelConfig, adapter: Adapter, layer: int = 0) -> tuple[int, int]:
    """The adapter's inputs and outputs in a layer."""
    sizes = [dense_layers(config)[layer][part] for part in adapter.parts]
    return sizes[0][0], sum(outputs for _, outputs in sizes)


def _by_adapter(
    config: ModelConfig, make: Callable[[Adapter, tuple[int, ...], tuple[int, int]], Any]
) -> Params:
    """The tree of `make(adapter, layers, (in, out))` over the adapters of all stacks."""

    def stack(run: int, slot: int, members: tuple[int, ...]) -> Tree:
        tree: Tree = {}
        for adapter in _of_stack(config, members):
            *outer, last = adapter.path.split("/")
            at = functools.reduce(lambda tree, name: tree.setdefault(name, {}), outer, tree)
            at[last] = make(adapter, members, size_of(config, adapter, members[0]))
        return tree

    return {"layers": layer_runs.by_slot(config.layers, stack)}


def _of_stack(config: ModelConfig, members: tuple[int, ...]) -> list[Adapter]:
    """The adapters that a stack of layers has."""
    return [a for a in config.lora.adapters if any(a.ranks[i] for i in members)]


def _rank(adapter: Adapter, members: tuple[int, ...]) -> int:
    return max(adapter.ranks[i] for i in members)


def _scaling(adapter: Adapter, members: tuple[int, ...]) -> np.ndarray:
    """Scalings [layers of its stack, r]; 0 beyond the layer's own rank."""
    scaling = np.zeros((len(members), _rank(adapter, members)), np.float32)
    for row, layer in zip(scaling, members):
        row[: adapter.ranks[layer]] = adapter.scalings[layer]
    return scaling


def leaf(tree: Any, path: str) -> Any:
    """The subtree at a path."""
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), tree)


def init(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 adapters: A uniform within 1 / sqrt(in), B zero, so the model is unchanged.

    This is PEFT's initialization, Kaiming uniform with a = sqrt(5).
    """

    def make(adapter: Adapter, members: tuple[int, ...], size: tuple[int, int]) -> Tree:
        shape = len(members), size[0], _rank(adapter, members)
        own = jax.random.fold_in(key, zlib.crc32(adapter.path.encode()) ^ members[0])
        bound = size[0] ** -0.5
        return {
            "lora_a": jax.random.uniform(own, shape, minval=-bound, maxval=bound),
            "lora_b": jnp.zeros((len(members), shape[-1], size[1])),
        }

    return _by_adapter(config, make)


def num_trained(config: ModelConfig) -> int:
    """The number of trained parameters."""
    if config.lora is None:
        return config.num_params
    whole = jax.tree.leaves(_whole(parameters.param_shapes(config)))
    return sum(x.size for x in whole) + sum(
        rank * sum(size_of(config, adapter, layer))
        for adapter in config.lora.adapters
        for layer, rank in enumerate(adapter.ranks)
        if rank
    )


# --- What learns ----------------------------------------------------------------------------------


def trained_shapes(config: ModelConfig) -> Params:
    """Shapes and dtype (float32) of the trained weights."""
    shapes = parameters.param_shapes(config)
    if config.lora is None:
        return shapes
    return jax.tree.map(lambda x: x, _adapter_shapes(config)) | _whole(shapes)


@functools.cache
def _adapter_shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def _whole(tree: Tree) -> Tree:
    return {name: part for name, part in tree.items() if name in _WHOLE}


def _but_whole(tree: Tree) -> Tree:
    return {name: part for name, part in tree.items() if name not in _WHOLE}


def trained_axes(config: ModelConfig) -> Params:
    """The logical axes of the trained weights: A splits like kernel inputs, B like outputs."""
    whole = parameters.logical_axes(config)
    if config.lora is None:
        return whole

    def make(adapter: Adapter, members: tuple[int, ...], size: tuple[int, int]) -> Tree:
        axes = parameters.layer_axes(config, config.layers[members[0]])
        (rows, columns), *others = (leaf(axes, part)["kernel"] for part in adapter.parts)
        columns = None if others else columns  # the parts of a device need not be of one layer
        return {"lora_a": ("layers", rows, None), "lora_b": ("layers", None, columns)}

    return _by_adapter(config, make) | _whole(whole)


# --- With the frozen weights ----------------------------------------------------------------------


def attached(frozen: Params | None, trained: Params, config: ModelConfig) -> Params:
    """The tree that the network reads: adapters beside frozen parameters, or `trained` itself."""
    if config.lora is None:
        return trained

    def stack(run: int, slot: int, members: tuple[int, ...]) -> Tree:
        tree = layer_runs.slot_of(frozen["layers"], config.layers, run, slot)
        for adapter in _of_stack(config, members):
            given = layer_runs.slot_of(trained["layers"], config.layers, run, slot)
            low, first = leaf(given, adapter.path), 0
            a, b, scaling = low["lora_a"], low["lora_b"], _scaling(adapter, members)
            for part in adapter.parts:
                kernel = leaf(tree, part)["kernel"]
                last = first + kernel.shape[-1]
                own = b if len(adapter.parts) == 1 else b[..., first:last]
                tree = _with(tree, f"{part}/kernel", Adapted(kernel, a, own, scaling))
                first = last
        return tree

    return frozen | trained | {"layers": layer_runs.by_slot(config.layers, stack)}


def _with(tree: Tree, path: str, value: Any) -> Tree:
    """The tree with another value at a path."""
    name, _, rest = path.partition("/")
    return tree | {name: _with(tree[name], rest, value) if rest else value}


def frozen_shapes(config: ModelConfig, dtype: Any) -> Params | None:
    """Shape and dtype of the parameters that do not learn, as `keeping` leaves them."""
    if config.lora is None:
        return None
    keep = lambda params: frozen_as(config, params, dtype)  # noqa: E731
    return jax.eval_shape(keep, _but_whole(parameters.param_shapes(config)))


def frozen_axes(config: ModelConfig) -> Params:
    """The logical axes of the frozen parameters."""
    axes = _but_whole(parameters.logical_axes(config))
    return dense.axes_of(frozen_shapes(config, jnp.float32), axes)


def weight_shapes(config: ModelConfig) -> Params:
    """Shapes of the tree that the network reads."""
    frozen = frozen_shapes(config, jnp.float32)
    return jax.eval_shape(lambda *w: attached(*w, config), frozen, trained_shapes(config))


def frozen_as(config: ModelConfig, params: Params, dtype: Any) -> Params:
    """Frozen parameters as they are stored: in `dtype`, and kernels optionally in codes."""
    one = lambda path, x: frozen_leaf(config, path, x.astype(dtype))  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, params)


def frozen_leaf(
    config: ModelConfig, path: Any, x: Array, whole: Callable[[Array], Array] = lambda x: x
) -> Any:
    """One frozen parameter, by its path; `whole` as in `nf4.quantize`."""
    if path[0].key != "layers" or dense.name_of(path) != "kernel" or config.lora.base == "auto":
        return x
    if config.lora.base == "int8":
        return quantize.int8(x, -2)
    double = config.codes != "nf4"
    # One layer after the other: quantizing takes several times a kernel's memory.
    return jax.lax.map(lambda kernel: nf4.quantize(kernel, double=double, whole=whole), x)


def merged(weights: Params, dtype: Any) -> Params:
    """Parameters with the adapters merged: kernels are summed in float32 and rounded once.

    One kernel after the other: a program for all would hold a float32 copy.
    """
    merge = jax.jit(lambda x: dense.plain(x).astype(dtype))
    return jax.tree.map(merge, weights, is_leaf=dense.is_node)
