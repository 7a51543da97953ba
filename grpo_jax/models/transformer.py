"""One decoder for all families, and the three ways it is run.

`completion_states` runs prompts once and their completions beside them (training and scoring),
`prefill` runs prompts and keeps their keys and values, `decode_token` adds one token per
completion. All three apply the same `Block` and hand it different attention. Layers are stacked and
scanned by runs of a pattern (`layer_runs.py`), except in sampling, where a scan would copy the
cache: `prefill` and `decode_token` take their layers one by one, in a list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.kernels import attention, dense, fused_attention, quantize
from grpo_jax.kernels import rotary as rotary_lib
from grpo_jax.kernels.attention import AttentionKernels, segments
from grpo_jax.kernels.kv_cache import RING, DecodeStep, KVCache
from grpo_jax.kernels.norm import AddNorm, Residual
from grpo_jax.models import block as block_lib
from grpo_jax.models import layer_runs, parameters
from grpo_jax.models.block import Block
from grpo_jax.models.lanes import PackedInputs
from grpo_jax.models.placement import ONE_DEVICE, REPLICATED, MlpPlacement, Placement
from grpo_jax.structs import Array, Layer, ModelConfig, Params, Rotary


def rotary_frequencies(rotary: Rotary, head_size: int) -> np.ndarray:
    """Radians per position of each rotary pair, float32 [H/2]; Llama-3 scaling by wavelength.

    The order of operations is Hugging Face's, with which models were trained: one unit in the last
    place of a frequency moves its angle by up to 0.008 at position 131,071.
    """
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    # NumPy's power in float32 is up to two units off, torch's is rounded from more digits.
    power = (rotary.theta ** exponent.astype(np.float64)).astype(np.float32)
    freq, scaling = np.float32(1) / power, rotary.scaling
    if scaling is None:
        return freq
    original, low, high = (
        np.float32(x)
        for x in (scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor)
    )
    factor, one = np.float32(scaling.factor), np.float32(1)
    # torch divides a number by an array so: the array's reciprocal times the number.
    wavelength = one / freq * np.float32(2 * np.pi)
    # A frequency of few turns is divided by the factor, one of many is kept, between them a
    # straight line.
    kept = (one / wavelength * original - low) / (high - low)
    between = (one - kept) * freq / factor + kept * freq
    slow = np.where(wavelength > original / low, freq / factor, between)
    return np.where(wavelength < original / high, freq, slow)


def _embed(params: Params, ids: Array, dtype) -> Array:
    table = params["embed"]["embedding"]
    if isinstance(table, quantize.Int8):
        return (table.codes[ids] * table.scale[ids][..., None]).astype(dtype)
    return table[ids].astype(dtype)


def _final_norm(
    params: Params, config: ModelConfig, x: Residual, dtype, kind: type[nn.Module] = AddNorm
) -> Array:
    norm = block_lib.rms_norm(config, dtype, kind=kind)
    return norm.apply({"params": params["norm"]}, x)[1]


def _angles(config: ModelConfig, position: Array) -> list[tuple[Array, Array]]:
    """Cosines and sines of the angles at positions, by `Layer.rotary`."""
    return [
        rotary_lib.rotary(position, rotary_frequencies(rotary, config.head_size))
        for rotary in config.rotaries
    ]


def _run_layers(
    apply: Callable[[Layer, Array, Params], Array],
    x: Array,
    params: Params,
    config: ModelConfig,
    remat: str,
    scan: bool,
) -> Array:
    """Runs `apply(layer, x, params)` for all layers, run by run.

    `remat` as in `config.model`. `scan`: in a loop, which copies what it keeps of each turn into
    arrays of all turns, and fills these with zeros first.
    """
    # Outside a scan XLA would merge what is computed again with the first time, and so keep it.
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,  # attention's have some
        policies.save_only_these_names(fused_attention.KEPT),
    )
    if config.lora:  # of two products with the same states the sum
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
    """The hidden states that predict the completions' tokens; every prompt is computed once.

    Ordered as `PackedInputs.predictors` has them. The states of padding and of empty entries mean
    nothing.
    """
    angles = _angles(config, inputs.position_BT)

    def apply(layer: Layer, x_BTD: Array, params: Params) -> Array:
        axes = dense.axes_of(params, parameters.layer_axes(config, layer))
        params = placement.gathered(params, axes)

        def attend(q, k, v):
            q, k = (rotary_lib.rotate(y, angles[layer.rotary]) for y in (q, k))
            q, k, v = map(placement.to_heads, (q, k, v))
            out = _attend_packed(kernels, inputs, q, k, v, layer.window)
            return placement.to_tokens(out), None

        x = Residual.of(placement.states(x_BTD))
        block = Block(config, layer, dtype, mlp=placement.mlp)
        x, _ = block.apply({"params": params}, x, attend)
        return placement.states(x.sum())

    axes = parameters.logical_axes(config)
    embed = placement.gathered(params["embed"], axes["embed"])
    x_BTD = placement.embedded(_embed({"embed": embed}, inputs.ids_BT, dtype))
    x_BTD = _run_layers(apply, x_BTD, params, config, remat, scan)
    return _final_norm(params, config, Residual.of(inputs.predictors(x_BTD)), dtype)


def _attend_packed(
    kernels: AttentionKernels,
    inputs: PackedInputs,
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
) -> Array:
    """Attention of packed rows [B, T, N, H]: of prompts, and of completions to theirs and own."""
    length_P, lanes = inputs.prompt_length_P, inputs.lanes
    if not inputs.prompt_tokens:
        by_lane = [x.reshape(-1, *x.shape[2:]) for x in (lanes.spread(x) for x in (q, k, v))]
        segment_BT = inputs.segment_PWT.reshape(-1, inputs.segment_PWT.shape[2])
        out = kernels.causal(*by_lane, segment_BT, window)
        return lanes.gather(out.reshape(*inputs.segment_PWT.shape, *out.shape[2:]))
    prompts = [inputs.prompts(x) for x in (q, k, v)]
    out_PQNH = kernels.causal(*prompts, segments(length_P, inputs.prompt_tokens), window)
    if not inputs.num_entries:
        return inputs.rows(out_PQNH, None)
    out_PWTNH = kernels.shared_prefix(
        *(lanes.spread(inputs.entries(x)) for x in (q, k, v)),
        inputs.segment_PWT,
        *prompts[1:],
        length_P,
        inputs.position_PWT,
        window,
    )
    return inputs.rows(out_PQNH, lanes.gather(out_PWTNH))


def prefill(
    params: Params,
    config: ModelConfig,
    prompt_RQ: Array,
    length_R: Array,
    *,
    dtype=jnp.float32,
    fused: bool = False,
    mlp: MlpPlacement = REPLICATED,
    kv_cache: KVCache = RING,
) -> tuple[Array, tuple]:
    """Hidden state of each prompt's last token [R, D], and the prompts' cache by layer.

    `fused`: the layers are those of `parameters.fuse_projections`.
    """
    angles = _angles(config, jnp.arange(prompt_RQ.shape[1])[None])
    x, cache = Residual.of(mlp.scatter(_embed(params, prompt_RQ, dtype))), []
    for layer, of_layer in zip(config.layers, params["layers"], strict=True):

        def attend(q, k, v, layer=layer):
            q, k = (rotary_lib.rotate(y, angles[layer.rotary]) for y in (q, k))
            out = attention.causal(q, k, v, segments(length_R, q.shape[1]), layer.window)
            return out, kv_cache.of_prompt(k, v)

        x, kept = Block(config, layer, dtype, fused, mlp).apply({"params": of_layer}, x, attend)
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
    *,
    dtype=jnp.float32,
    fused: bool = False,
    mlp: MlpPlacement = REPLICATED,
    kv_cache: KVCache = RING,
    norm: type[nn.Module] = AddNorm,
) -> tuple[Array, tuple]:
    """Hidden state after one more token per lane [R, W, D], and the cache by layer with it.

    `fused` as in `prefill`.
    """
    position_RW = step.prompt_length_R[:, None] + step.time_RW
    angles = _angles(config, position_RW)
    x = Residual.of(mlp.scatter(_embed(params, token_RW, dtype)))
    cache = list(cache)
    for i, (layer, of_layer) in enumerate(zip(config.layers, params["layers"], strict=True)):
        at_layer = step.replace(cos_sin=angles[layer.rotary], window=layer.window)

        def attend(q, k, v, i=i, at_layer=at_layer):
            out, cache[i] = kv_cache.extend(cache[i], q, k, v, at_layer)
            return out, None

        block = Block(config, layer, dtype, fused, mlp, norm)
        x, _ = block.apply({"params": of_layer}, x, attend)
    return mlp.gather(_final_norm(params, config, x, dtype, norm)), tuple(cache)
