"""The decoder's parameters: initialization, logical axes, and their form in decoding.

They are float32 unless the caller casts or quantizes them (`dense.in_precision`). Kernels are
[in, out], heads contiguous:

    embed/embedding [V, D]      norm/scale [D]      head/kernel [D, V] (untied models only)
    score/kernel [D, 1] (in place of the LM head, with `ModelConfig.head` "scalar")
    layers/ (stacked by slot as in `layer_runs.py`, with a leading axis)
        attention_norm/scale [D]      mlp_norm/scale [D] (norms before the branches)
        attention_post_norm/scale [D] mlp_post_norm/scale [D] (norms after them)
        attention/{q,k,v,o}/kernel    attention/{q,k,v,o}/bias (where the family has them)
        attention/{q_norm,k_norm}/scale [H], or of all heads [N * H] and [K * H]
        mlp/{gate,up,down}/kernel
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.kernels import dense as dense_lib
from grpo_jax.kernels.norm import Residual
from grpo_jax.models import layer_runs
from grpo_jax.models.block import Block
from grpo_jax.structs import Array, Layer, ModelConfig, Params


def _boxed_block(config: ModelConfig, layer: Layer, key: Array) -> Params:
    """One layer's parameters, boxed with their logical axes."""
    x = Residual.of(jnp.zeros((1, config.width)))
    return Block(config, layer).init(key, x, lambda q, k, v: (q, None))["params"]


def init(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters: normal with standard deviation 0.02; norms scale by 1.

    Call it under jit with the shardings of `logical_axes` as `out_shardings`, so that no device
    holds the whole model.
    """
    layers_key, embed_key, head_key = jax.random.split(key, 3)
    layer_keys = jax.random.split(layers_key, config.num_layers)
    normal = nn.initializers.normal(0.02)

    def stack(run: int, slot: int, members: Sequence[int]) -> Params:
        layer = config.layers[members[0]]
        block = lambda key: nn.unbox(_boxed_block(config, layer, key))  # noqa: E731
        return jax.vmap(block)(layer_keys[np.array(members)])

    params = {
        "embed": {"embedding": normal(embed_key, (config.vocab_size, config.width))},
        "layers": layer_runs.by_slot(config.layers, stack),
        "norm": {"scale": jnp.full(config.width, 1 - config.norm_offset, jnp.float32)},
    }
    if config.head == "scalar":
        params["score"] = scalar_head(config, head_key)
    elif has_own_head(config):
        params["head"] = {"kernel": normal(head_key, (config.width, config.vocab_size))}
    return params


def has_own_head(config: ModelConfig) -> bool:
    """Whether the parameters have an LM head besides the embedding."""
    return config.head == "vocabulary" and not config.tied_head


def scalar_head(config: ModelConfig, key: Array) -> Params:
    """A fresh scalar head: a float32 kernel [D, 1] without bias, of variance 1 / (D + 1).

    As the reward models of Stiennon et al. 2020 (arXiv:2009.01325) begin, by Huang et al. 2024
    (arXiv:2403.17031, detail 8). OpenRLHF takes 1 / (D + 1) as the deviation.
    """
    deviation = (config.width + 1) ** -0.5
    return {"kernel": deviation * jax.random.normal(key, (config.width, 1))}


def logical_axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, a tuple of names for each; see `devices/sharding.py`."""
    return jax.tree.map(lambda name: name, _logical_axes(config))


@functools.cache
def layer_axes(config: ModelConfig, layer: Layer) -> Params:
    """The logical axes of one layer's parameters, without the stack's axis."""
    return jax.tree.map(tuple, nn.get_partition_spec(_boxed_shapes(config, layer)))


@functools.cache
def _boxed_shapes(config: ModelConfig, layer: Layer) -> Params:
    """Shape and dtype of one layer's parameters, boxed with their logical axes."""
    return jax.eval_shape(lambda: _boxed_block(config, layer, jax.random.key(0)))


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


@functools.cache  # cached: every program asks, and each answer is a trace
def _logical_axes(config: ModelConfig) -> Params:

    def stack(run: int, slot: int, members: Sequence[int]) -> Params:
        axes = layer_axes(config, config.layers[members[0]])
        return jax.tree.map(lambda names: ("layers", *names), axes, is_leaf=_is_axes)

    axes = {
        "embed": {"embedding": ("vocab", "embed")},
        "layers": layer_runs.by_slot(config.layers, stack),
        "norm": {"scale": ("norm",)},
    }
    if config.head == "scalar":
        axes["score"] = {"kernel": ("embed", None)}
    elif has_own_head(config):
        axes["head"] = {"kernel": ("embed", "vocab")}
    return axes


def param_shapes(config: ModelConfig) -> Params:
    """Shape and dtype of every parameter, without making any."""
    return jax.tree.map(lambda shape: shape, _param_shapes(config))


@functools.cache
def _param_shapes(config: ModelConfig) -> Params:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731

    def stack(run: int, slot: int, members: Sequence[int]) -> Params:
        one = nn.unbox(_boxed_shapes(config, config.layers[members[0]]))
        return jax.tree.map(lambda x: shape(len(members), *x.shape), one)

    shapes = {
        "embed": {"embedding": shape(config.vocab_size, config.width)},
        "layers": layer_runs.by_slot(config.layers, stack),
        "norm": {"scale": shape(config.width)},
    }
    if config.head == "scalar":
        shapes["score"] = {"kernel": shape(config.width, 1)}
    elif has_own_head(config):
        shapes["head"] = {"kernel": shape(config.width, config.vocab_size)}
    return shapes


def head_kernel(params: Params) -> Array:
    """The LM head [D, V]; in a tied model, the transposed embedding."""
    if "head" in params:
        return params["head"]["kernel"]
    return params["embed"]["embedding"].T


_CAST = ("kernel", "bias", "a", "b", "lora_a", "lora_b")


def cast_layers(params: Params, dtype) -> Params:
    """Casts the layers' kernels, biases and adapters to the compute dtype, for all microbatches.

    Embedding, head and norms stay as they are: the gradients of many tokens are summed into them.
    """

    def one(path, x: Array) -> Array:
        stays = dense_lib.in_codes(x) or dense_lib.name_of(path) not in _CAST
        return x if stays else x.astype(dtype)

    layers = params["layers"]
    layers = jax.tree_util.tree_map_with_path(one, layers, is_leaf=dense_lib.in_codes)
    return params | {"layers": layers}


def layer_stacks(layers: Params, config: ModelConfig) -> list[tuple[Params, int]]:
    """For every layer: the stack with its parameters, and its index in the stack.

    `layers` may be any tree with the structure of the layers' parameters.
    """
    places = layer_runs.places(config.layers)
    return [(layer_runs.slot_of(layers, config.layers, r, s), turn) for r, s, turn in places]


# By module: the name and the parts of each kernel that `fuse_projections` makes.
_FUSED = {"attention": ("qkv", ("q", "k", "v")), "mlp": ("gate_up", ("gate", "up"))}


def fuse_projections(
    layer: Params, join: Callable[..., Any] = lambda *xs: jnp.concatenate(xs, axis=-1)
) -> Params:
    """One layer's weights, with projections of the same states concatenated in one kernel.

    With few tokens one product is faster than three. `join` concatenates the arrays of all parts.
    """
    for module, (name, parts) in _FUSED.items():
        dense = dict(layer[module])
        trees = [dense.pop(part) for part in parts]
        dense[name] = {
            leaf: dense_lib.side_by_side([tree[leaf] for tree in trees], join) for leaf in trees[0]
        }
        layer = layer | {module: dense}
    return layer
