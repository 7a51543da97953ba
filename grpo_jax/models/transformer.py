"""One decoder for all families, and the three ways it is run.

`completion_states` runs prompts once and their completions beside them (training and scoring),
`prefill` runs prompts and keeps their keys and values, `decode_token` adds one token per
completion. All three apply the same `Block` with different attention. Layers are stacked and
scanned by runs of a pattern (`layer_runs.py`). In sampling a scan would copy the cache, so
`prefill` and `decode_token` take a list of layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from grpo_jax.kernels import attention, dense, fused_attention, quantize
from grpo_jax.kernels import rotary as rotary_lib
from grpo_jax.kernels.attention import AttentionKernels, segments
from grpo_jax.kernels.kv_cache import RING, Chunk, DecodeStep, KVCache
from grpo_jax.kernels.norm import AddNorm, Residual
from grpo_jax.kernels.primitives import rows
from grpo_jax.kernels.quantize import FrozenProduct, frozen_product
from grpo_jax.models import block as block_lib
from grpo_jax.models import frequencies, layer_runs, parameters
from grpo_jax.models.block import Block
from grpo_jax.models.lanes import PackedInputs
from grpo_jax.models.placement import ONE_DEVICE, REPLICATED, MlpPlacement, Placement
from grpo_jax.structs import Array, Layer, ModelConfig, Params


def _embed(params: Params, config: ModelConfig, ids: Array, dtype) -> Array:
    table = params["embed"]["embedding"]
    if isinstance(table, quantize.Int8):
        x = (table.codes[ids] * table.scale[ids][..., None]).astype(dtype)
    else:
        x = rows(table, ids).astype(dtype)
    # The factor is rounded to the dtype first, as in Gemma's training: sqrt(1152) is 34 in bf16.
    return x if config.embed_factor == 1 else x * jnp.asarray(config.embed_factor, dtype)


def _final_norm(
    params: Params, config: ModelConfig, x: Residual, dtype, kind: type[nn.Module] = AddNorm
) -> Array:
    norm = block_lib.rms_norm(config, dtype, kind=kind)
    of_norm = params["norm"]
    if config.logit_factor != 1 and config.head == "vocabulary":
        # In the scale, since logits are linear in it: no extra rounding.
        scale_D = of_norm["scale"].astype(jnp.float32) + config.norm_offset
        of_norm = {"scale": scale_D * config.logit_factor - config.norm_offset}
    return norm.apply({"params": of_norm}, x)[1]


class _Positions(NamedTuple):
    """Values that follow from the positions of tokens [...]."""

    angles: list[tuple[Array, Array]]  # cosines and sines [..., H/2], by `Layer.rotary`
    growth: Array | None  # of queries, [..., 1, 1]; None: 1

    @staticmethod
    def of(config: ModelConfig, position: Array) -> _Positions:
        longest = config.longest or config.max_position
        angles = [
            rotary_lib.rotary(
                position,
                frequencies.of(rotary, config.head_size, longest),
                frequencies.amplitudes(rotary, config),
            )
            for rotary in config.rotaries
        ]
        if (grows := config.query_growth) is None:
            return _Positions(angles, None)
        growth = 1 + grows.beta * jnp.log1p((position // grows.period).astype(jnp.float32))
        return _Positions(angles, growth[..., None, None])

    def grown(self, q: Array) -> Array:
        """Queries [..., N, H] times their growth."""
        return q if self.growth is None else q * self.growth.astype(q.dtype)

    def rotated(self, layer: Layer, q: Array, k: Array) -> tuple[Array, Array]:
        """A layer's queries and keys, grown and rotated for attention."""
        cos_sin = self.angles[layer.rotary]
        return rotary_lib.rotate(self.grown(q), cos_sin), rotary_lib.rotate(k, cos_sin)


def _run_layers(
    apply: Callable[[Layer, Array, Params], Array],
    x: Array,
    params: Params,
    config: ModelConfig,
    remat: str,
    scan: bool,
) -> Array:
    """Runs `apply(layer, x, params)` for all layers, run by run.

    `remat` as in `config.model`. `scan`: in a loop. A loop copies the saved values of each turn
    into arrays for all turns, which it first fills with zeros.
    """
    # Outside a scan XLA would merge the recomputation with the first computation, and so keep its
    # values.
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,  # attention's products have batch dims
        policies.save_only_these_names(fused_attention.KEPT),
    )
    if config.lora:  # the sum of both products with the same states
        dots = policies.save_only_these_names(dense.KEPT, fused_attention.KEPT)
    checkpoint = functools.partial(
        jax.checkpoint, policy=dots if remat == "dots" else None, prevent_cse=not scan
    )
    for r, (pattern, count) in enumerate(layer_runs.runs(config.layers)):
        bodies = [functools.partial(apply, layer) for layer in pattern]
        bodies = bodies if remat == "none" else list(map(checkpoint, bodies))
        stacks = [
            layer_runs.slot_of(params["layers"], config.layers, r, slot)
            for slot in range(len(pattern))
        ]

        def turn(x: Array, params: list[Params], bodies=bodies):
            for body, of_layer in zip(bodies, params, strict=True):
                x = body(x, of_layer)
            return x, None

        x, _ = jax.lax.scan(turn, x, stacks, unroll=1 if scan else count)
    return x


def completion_states(
    params: Params,
    config: ModelConfig,
    inputs: PackedInputs,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    scan: bool = True,
    placement: Placement = ONE_DEVICE,
    kernels: AttentionKernels = attention,
) -> Array:
    """The hidden states that predict the completions' tokens; each prompt is computed once.

    Ordered as in `PackedInputs.predictors`. The states of padding and of empty entries are
    arbitrary.
    """
    positions = _Positions.of(config, inputs.position_BT)
    windows = () if inputs.lanes else {layer.window for layer in config.layers}
    seen = {window: inputs.seen(window) for window in windows}

    def apply(layer: Layer, x_BTD: Array, params: Params) -> Array:
        axes = dense.axes_of(params, parameters.layer_axes(config, layer))
        params = placement.gathered(params, axes)

        def attend(q, k, v):
            q, k = positions.rotated(layer, q, k)
            q, k, v = map(placement.to_heads, (q, k, v))
            if seen:
                out = kernels.by_row(q, k, v, seen[layer.window], config.attention_cap)
            else:
                out = _attend_packed(kernels, inputs, q, k, v, layer.window, config.attention_cap)
            return placement.to_tokens(out), None

        x = Residual.of(placement.states(x_BTD))
        block = Block(config, layer, dtype, mlp=placement.mlp)
        x, _ = block.apply({"params": params}, x, attend)
        return placement.states(x.sum())

    axes = parameters.logical_axes(config)
    embed = placement.gathered(params["embed"], axes["embed"])
    x_BTD = placement.embedded(_embed({"embed": embed}, config, inputs.ids_BT, dtype))
    x_BTD = _run_layers(apply, x_BTD, params, config, remat, scan)
    return _final_norm(params, config, Residual.of(inputs.predictors(x_BTD)), dtype)


def _attend_packed(
    kernels: AttentionKernels,
    inputs: PackedInputs,
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    cap: float | None,
) -> Array:
    """Attention of packed rows [B, T, N, H] in lanes; completions also see their prompt."""
    length_P, lanes = inputs.prompt_length_P, inputs.lanes
    if not inputs.prompt_tokens:
        by_lane = [x.reshape(-1, *x.shape[2:]) for x in (lanes.spread(x) for x in (q, k, v))]
        segment_BT = inputs.segment_PWT.reshape(-1, inputs.segment_PWT.shape[2])
        out = kernels.causal(*by_lane, segment_BT, window, cap)
        return lanes.gather(out.reshape(*inputs.segment_PWT.shape, *out.shape[2:]))
    prompts = [inputs.prompts(x) for x in (q, k, v)]
    out_PQNH = kernels.causal(*prompts, segments(length_P, inputs.prompt_tokens), window, cap)
    if not inputs.num_entries:
        return inputs.rows(out_PQNH, None)
    out_PWTNH = kernels.shared_prefix(
        *(lanes.spread(inputs.entries(x)) for x in (q, k, v)),
        inputs.segment_PWT,
        *prompts[1:],
        length_P,
        inputs.position_PWT,
        window,
        cap,
    )
    return inputs.rows(out_PQNH, lanes.gather(out_PWTNH))


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a decoder computes while it samples."""

    dtype: Any = jnp.float32  # of activations
    fused: bool = False  # the layers are those of `parameters.fuse_projections`
    mlp: MlpPlacement = REPLICATED
    kv_cache: KVCache = RING  # storage of keys and values, and attention to them
    norm: type[nn.Module] = AddNorm  # of states, of one token a lane
    frozen_product: FrozenProduct = frozen_product  # with kernels in codes, of one token a lane


def _traced_once(f: Callable) -> Callable[[Layer], Callable]:
    """`f(layer, ...)`: traced for the first layer of a kind, and repeated for the others."""
    return functools.cache(lambda layer: jax.jit(functools.partial(f, layer), inline=True))


def prefill(
    params: Params,
    config: ModelConfig,
    prompt_RQ: Array,
    length_R: Array,
    how: Decoding = Decoding(),
) -> tuple[Array, tuple]:
    """Hidden states of the prompts' last tokens [R, D], and the prompts' cache by layer."""
    dtype, mlp = how.dtype, how.mlp
    positions = _Positions.of(config, jnp.arange(prompt_RQ.shape[1])[None])
    x, cache = Residual.of(mlp.scatter(_embed(params, config, prompt_RQ, dtype))), []

    def one(layer: Layer, of_layer: Params, x: Residual, positions: _Positions, length_R: Array):
        def attend(q, k, v):
            q, k = positions.rotated(layer, q, k)
            own = segments(length_R, q.shape[1])
            out = attention.causal(q, k, v, own, layer.window, config.attention_cap)
            return out, how.kv_cache.of_prompt(k, v)

        block = Block(config, layer, dtype, how.fused, mlp)
        return block.apply({"params": of_layer}, x, attend)

    of_kind = _traced_once(one)
    for layer, of_layer in zip(config.layers, params["layers"], strict=True):
        x, kept = of_kind(layer)(of_layer, x, positions, length_R)
        cache.append(kept)
    at_R11 = (length_R - 1)[:, None, None]
    last_RD = jnp.take_along_axis(x.sum(), at_R11, axis=1)[:, 0]
    hidden_RD = _final_norm(params, config, Residual.of(last_RD), dtype)
    return mlp.gather(hidden_RD), tuple(cache)


def decode_token(
    params: Params,
    config: ModelConfig,
    token_RW: Array,
    cache: tuple,
    step: DecodeStep,
    how: Decoding = Decoding(),
) -> tuple[Array, tuple]:
    """Hidden states [R, W, D] of one more token per lane, and the updated cache by layer."""
    position_RW = step.prompt_length_R[:, None] + step.time_RW
    given = params, config, token_RW, position_RW, cache
    x, cache = _with_cache(*given, how.kv_cache.extend, step, how)
    return how.mlp.gather(_final_norm(params, config, x, how.dtype, how.norm)), cache


def append_tokens(
    params: Params,
    config: ModelConfig,
    ids_RWM: Array,
    cache: tuple,
    chunk: Chunk,
    how: Decoding = Decoding(),
) -> tuple[Array, tuple]:
    """Hidden states [R, W, D] of a chunk's last token in each lane, and the cache with the chunk.

    Of `how` it reads no `norm` and no `frozen_product`: a chunk has many tokens.
    """
    how = dataclasses.replace(how, norm=AddNorm, frozen_product=frozen_product)
    given = params, config, ids_RWM, chunk.positions(ids_RWM.shape[2]), cache
    x, cache = _with_cache(*given, how.kv_cache.append, chunk, how)
    last = Residual.of(x.sum()[:, :, -1])
    return how.mlp.gather(_final_norm(params, config, last, how.dtype)), cache


def _with_cache(
    params: Params,
    config: ModelConfig,
    ids: Array,
    position: Array,
    cache: tuple,
    extend: Callable,
    step: DecodeStep | Chunk,
    how: Decoding,
) -> tuple[Residual, tuple]:
    """States of new tokens after all layers, and the updated cache by layer.

    `extend(cache, queries, keys, values, step)` is a method of the cache.
    """
    positions = _Positions.of(config, position)
    x = Residual.of(how.mlp.scatter(_embed(params, config, ids, how.dtype)))
    kinds = how.norm, how.frozen_product

    def one(layer: Layer, of_layer: Params, x: Residual, kept: Any, positions: _Positions, step):
        cos_sin = positions.angles[layer.rotary]
        at_layer = step.replace(cos_sin=cos_sin, window=layer.window, cap=config.attention_cap)

        def attend(q, k, v):
            return extend(kept, positions.grown(q), k, v, at_layer)

        block = Block(config, layer, how.dtype, how.fused, how.mlp, *kinds)
        return block.apply({"params": of_layer}, x, attend)

    of_kind, later = _traced_once(one), []
    for layer, of_layer, kept in zip(config.layers, params["layers"], cache, strict=True):
        x, kept = of_kind(layer)(of_layer, x, kept, positions, step)
        later.append(kept)
    return x, tuple(later)
