"""Makes the weights for sampling from the trained weights: `Publisher`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grpo_jax.devices import compiling, sharding
from grpo_jax.devices.compiling import Call
from grpo_jax.kernels import dense
from grpo_jax.kernels.primitives import nth
from grpo_jax.models import lora, parameters
from grpo_jax.sampling.decode import Decoder
from grpo_jax.structs import Array, ModelConfig, Params


class Publisher:
    """Makes the weights for sampling: layer by layer, in the compute dtype or 8 bits.

    They are not sharded over fsdp, so decoding gathers no parameters token by token; and they are a
    list of layers, so no decode program unstacks them. Other parts are shared with the trained
    weights if they do not change.
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._changed_parts: dict[Any, list[str]] = {}
        like = self.like(lora.weight_shapes(decoder.model))
        placed = jax.tree.map(lambda x: x.sharding, like)

        def publish_layer(stack: Params, turn: Array) -> Params:
            return self._layer(stack, turn)

        def publish_part(part: Params) -> Params:
            return self._in_precision(part)

        programs: dict[Any, Callable] = {}  # one for all layers with equal shardings
        self._publish_layer = []
        for layer in placed["layers"]:
            shardings, structure = jax.tree.flatten(layer)
            kind = structure, tuple(shardings)
            if kind not in programs:
                programs[kind] = jax.jit(publish_layer, out_shardings=layer)
            self._publish_layer.append(programs[kind])
        self._publish_part = {
            name: jax.jit(publish_part, out_shardings=placed[name])
            for name in placed
            if name != "layers"
        }

    def __call__(self, params: Params) -> Params:
        published = {name: part for name, part in params.items() if name != "layers"}
        for name in self.changed_parts(params):
            published[name] = self._part(params, name)()
        layers: list[Params] = []  # one by one: one program for all would hold a second copy
        for call in self._of_layers(params):
            if len(layers) >= compiling.MAX_IN_FLIGHT:
                jax.block_until_ready(layers[-compiling.MAX_IN_FLIGHT])
            layers.append(call())
        return published | {"layers": layers}

    def calls(self, params: Params) -> list[Call]:
        """The programs in their order, for the shapes of the parameters."""
        calls = [self._part(params, name) for name in self.changed_parts(params)]
        layers = self._of_layers(params)
        kinds = [_kind(call.args[0]) for call in layers]
        for kind, times in collections.Counter(kinds).items():  # each is compiled once
            calls.append(dataclasses.replace(layers[kinds.index(kind)], times=times))
        return calls

    def _part(self, params: Params, name: str) -> Call:
        return Call(self._publish_part[name], (params[name],), name)

    def _of_layers(self, params: Params) -> list[Call]:
        layers = parameters.layer_stacks(params["layers"], self._decoder.model)
        return [
            Call(program, (stack, np.int32(turn)))
            for program, (stack, turn) in zip(self._publish_layer, layers, strict=True)
        ]

    def _in_precision(self, part: Params) -> Params:
        int8 = self._decoder.weights == "int8"
        return dense.in_precision(part, self._decoder.dtype, int8=int8)

    def _layer(self, stack: Params, turn: Array) -> Params:
        layer = jax.tree.map(lambda x: nth(x, turn), stack)
        if self._decoder.merge:
            layer = jax.tree.map(dense.plain, layer, is_leaf=dense.is_node)
        layer = parameters.fuse_projections(layer) if self._decoder.fuse else layer
        if self._decoder.plain_scales:
            layer = dense.with_plain_scales(layer)
        return self._in_precision(layer)

    def changed_parts(self, params: Params) -> list[str]:
        """Names of the parts besides the layers that sampling cannot use unchanged."""
        rest = {name: part for name, part in params.items() if name != "layers"}
        leaves, structure = jax.tree.flatten(rest)
        kind = structure, tuple((x.dtype, x.sharding) for x in leaves)
        if kind not in self._changed_parts:  # asked at every rollout, and needs tracing
            like = self.like(params)
            self._changed_parts[kind] = [n for n in rest if not _is_like(rest[n], like[n])]
        return self._changed_parts[kind]

    def like(self, params: Params) -> Params:
        """Shape, dtype and sharding of the result, from arrays or their shapes."""
        mesh, model = self._decoder.mesh, self._decoder.model
        axes = _axes_in_decoding(model, self._decoder.parts)
        if self._decoder.fuse:  # all are replicated and have equal axes
            first = lambda *names: names[0]  # noqa: E731
            axes["layers"] = [parameters.fuse_projections(layer, first) for layer in axes["layers"]]
        rest = {name: params[name] for name in params if name != "layers"}
        of_stack: dict[int, Params] = {}
        layers = []
        for stack, turn in parameters.layer_stacks(params["layers"], model):
            if id(stack) not in of_stack:
                of_stack[id(stack)] = jax.eval_shape(self._layer, stack, np.int32(turn))
            layers.append(of_stack[id(stack)])
        like = jax.eval_shape(self._in_precision, rest) | {"layers": layers}
        placed = sharding.tree_shardings(mesh, dense.axes_of(like, axes), like)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, placed
        )


def _kind(stack: Params) -> Any:
    leaves, structure = jax.tree.flatten(stack)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


def _axes_in_decoding(model: ModelConfig, parts: int) -> Params:
    """Logical axes of the decode weights, layer by layer: not sharded over fsdp.

    Attention is replicated too if it is split by row, in `parts`, not by head.
    """
    whole = ("embed", "heads", "kv_heads") if parts > 1 else ("embed",)
    layers = [parameters.layer_axes(model, layer) for layer in model.layers]
    return jax.tree.map(
        lambda names: tuple(None if n in whole else n for n in names),
        parameters.logical_axes(model) | {"layers": layers},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _is_like(part: Params, like: Params) -> bool:
    """Whether the arrays have these dtypes and shardings."""
    if jax.tree.structure(part) != jax.tree.structure(like):
        return False
    return all(
        x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(like))
    )
