"""One decoder for Llama, Qwen2, Qwen3 and Mistral, and the three ways it is run.

`score` runs prompts once and their completions beside them (training and scoring), `prefill` runs
prompts and keeps their keys and values, `decode_token` adds one token per completion. All three
apply the same `Block`; only the attention that it is handed differs. Layers are stacked along a
leading axis of every parameter and scanned, except in sampling, where a scan would copy the cache:
`prefill` and `decode_token` take their layers one by one, in a list.

Parameters, float32 unless the caller cast them, for sampling also those of `quantize.weights`;
kernels are [in, out], heads contiguous:

    embed/embedding [V, D]      norm/scale [D]      head/kernel [D, V] (untied models only)
    layers/ (all with a leading L)
        attention_norm/scale [D]      mlp_norm/scale [D]
        attention/{q,k,v,o}/kernel    attention/{q,k,v,o}/bias (where the family has them)
        attention/{q_norm,k_norm}/scale [H] (Qwen3)
        mlp/{gate,up,down}/kernel
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import attention, merged, quantize
from grpo_jax.models.norms import Sum
from grpo_jax.structs import Array, ModelConfig, Params

# Queries, keys and values, none of them rotated yet, to the attention's output and whatever the
# caller wants kept of them.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
# An activation and the logical axes of its dimensions to the same, placed over the devices.
Place = Callable[[Array, tuple[str | None, ...]], Array]


class Rows(NamedTuple):
    """How rows that devices divide between them become whole on each for the MLP, and the inverse.

    It is split by width over devices that have the attention of other rows each.
    """

    whole: Callable[[Array], Array] = lambda x: x
    split: Callable[[Array], Array] = lambda x: x
    wide: Callable[[Array], Array] = lambda x: x  # what is inside the MLP, [tokens, F]

    @staticmethod
    def placed(place: Place, row_axis: str) -> Rows:
        by = lambda axis: lambda x: place(x, (axis,) + (None,) * (x.ndim - 1))  # noqa: E731
        return Rows(by("shard_rows"), by(row_axis), lambda x: place(x, ("shard_rows", "mlp")))


UNDIVIDED = Rows()


class ByRow(NamedTuple):
    """Devices that share the MLP and have the attention of rows of their own each."""

    axis: str  # the logical axis of the rows
    gather: Callable[[Array, tuple[str, ...]], Array]  # a parameter of these logical axes


Kernels = Any  # `attention`, or what has its `causal`, `shared_prefix` and `shares_lanes`


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotary pair, float32 [H/2]; Llama-3 scaling by wavelength.

    In the order of operations of Hugging Face, with which models were trained: at position 131,071
    an angle is off by up to 0.008 for each unit in the last place of its frequency.
    """
    exponent = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    # NumPy's power in float32 is up to two units off, torch's is rounded from more digits.
    power = (config.rope_theta ** exponent.astype(np.float64)).astype(np.float32)
    freq, scaling = np.float32(1) / power, config.rope_scaling
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


class Dense(nn.Module):
    """A dense layer whose kernel may be in 8 bits."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normal = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
        kernel = self.param("kernel", normal, (x.shape[-1], self.features))
        y = quantize.product(x.astype(self.dtype), kernel, self.dtype)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", zeros, (self.features,))
            y += bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def _dense(features: int, axes: tuple[str, str], name: str, dtype, bias: bool = False) -> Dense:
    return Dense(features, axes, dtype, bias, name=name)


def _by_token(dense: Callable[[Array], Array], x: Array) -> Array:
    """A dense layer on [..., D] as one product over [tokens, D].

    With more axes the gradient of the kernel contracts over several at once, for which XLA on CPU
    first turns the incoming gradient round: 1.25 times the time of the product alone.
    """
    y = dense(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _norm(config: ModelConfig, dtype, name: str | None = None, kind: Any = nn.RMSNorm) -> Any:
    return kind(
        epsilon=config.norm_eps,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        name=name,
    )


def _normed(norm: Callable[..., Any], x: Array | Sum) -> tuple[Array, Array]:
    """States that may still be to be added, and their norm."""
    return norm(x) if isinstance(x, Sum) else (x, norm(x))


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, attend: Attend):
        c = self.config
        counts = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        by_head = lambda y: y.reshape(*y.shape[:-1], -1, c.head_size)  # noqa: E731
        if self.has_variable("params", "qkv"):  # of `joined`
            features = sum(counts.values()) * c.head_size
            dense = _dense(features, ("embed", "heads"), "qkv", self.dtype, c.qkv_bias)
            ends = np.cumsum(list(counts.values()))[:-1]
            q, k, v = jnp.split(by_head(_by_token(dense, x)), ends, axis=-2)
        else:
            qkv = []
            for name, count in counts.items():
                axes = ("embed", "heads" if name == "q" else "kv_heads")
                dense = _dense(count * c.head_size, axes, name, self.dtype, c.qkv_bias)
                qkv.append(by_head(_by_token(dense, x)))
            q, k, v = qkv
        if c.qk_norm:
            q = _norm(c, self.dtype, "q_norm")(q)
            k = _norm(c, self.dtype, "k_norm")(k)
        out, kept = attend(q, k, v)
        out = out.reshape(*x.shape[:-1], c.num_heads * c.head_size)
        dense = _dense(c.width, ("heads", "embed"), "o", self.dtype, c.out_bias)
        return _by_token(dense, out), kept


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any

    rows: Rows

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _by_token(self._tokens, x)

    def _tokens(self, x: Array) -> Array:
        x, width = self.rows.whole(x), self.config.mlp_width
        if self.has_variable("params", "gate_up"):  # of `joined`
            both = _dense(2 * width, ("embed", "mlp"), "gate_up", self.dtype)(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = _dense(width, ("embed", "mlp"), "gate", self.dtype)(x)
            up = _dense(width, ("embed", "mlp"), "up", self.dtype)(x)
        y = self.rows.wide(nn.silu(self.rows.wide(gate)) * self.rows.wide(up))
        return self.rows.split(_dense(self.config.width, ("mlp", "embed"), "down", self.dtype)(y))


class Block(nn.Module):
    """One layer on hidden states [..., D]; any leading axes."""

    config: ModelConfig
    dtype: Any = jnp.float32
    norm: Any = nn.RMSNorm  # or `FusedNorm`, and what is returned is still to be added

    @nn.compact
    def __call__(self, x: Array | Sum, attend: Attend, rows: Rows = UNDIVIDED):
        norm = functools.partial(_norm, self.config, self.dtype, kind=self.norm)
        plus = jnp.add if self.norm is nn.RMSNorm else Sum
        x, y = _normed(norm("attention_norm"), x)
        y, kept = Attention(self.config, self.dtype, name="attention")(y, attend)
        x, y = _normed(norm("mlp_norm"), plus(x, y))
        return plus(x, MLP(self.config, self.dtype, rows, name="mlp")(y)), kept


def _boxed_block(config: ModelConfig, key: Array) -> Params:
    """One layer's parameters in the boxes that carry their logical axes."""
    x = jnp.zeros((1, config.width))
    return Block(config).init(key, x, lambda q, k, v: (q, None))["params"]


def init(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters: normals of deviation 0.02, norms at 1.

    Call it under jit with the shardings of `logical_axes` as `out_shardings`, so that no device
    holds the whole model.
    """
    layers_key, embed_key, head_key = jax.random.split(key, 3)
    normal = nn.initializers.normal(0.02)
    params = {
        "embed": {"embedding": normal(embed_key, (config.vocab_size, config.width))},
        "layers": jax.vmap(lambda k: nn.unbox(_boxed_block(config, k)))(
            jax.random.split(layers_key, config.num_layers)
        ),
        "norm": {"scale": jnp.ones(config.width)},
    }
    if not config.tied_head:
        params["head"] = {"kernel": normal(head_key, (config.width, config.vocab_size))}
    return params


def logical_axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, a tuple of names for each; see `sharding.py`."""
    return jax.tree.map(lambda name: name, _logical_axes(config))


@functools.cache  # asked for by each program, and a trace each time
def _logical_axes(config: ModelConfig) -> Params:
    boxed = jax.eval_shape(lambda: _boxed_block(config, jax.random.key(0)))
    axes = {
        "embed": {"embedding": ("vocab", "embed")},
        "layers": jax.tree.map(lambda spec: ("layers", *spec), nn.get_partition_spec(boxed)),
        "norm": {"scale": ("norm",)},
    }
    if not config.tied_head:
        axes["head"] = {"kernel": ("embed", "vocab")}
    return axes


def param_shapes(config: ModelConfig) -> Params:
    """Shape and dtype of every parameter, without making any."""
    return jax.tree.map(lambda shape: shape, _param_shapes(config))


@functools.cache
def _param_shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def head_kernel(params: Params) -> Array:
    """The LM head [D, V]: the embedding transposed where the model ties them."""
    if "head" in params:
        return params["head"]["kernel"]
    return params["embed"]["embedding"].T


def with_layers_in(params: Params, dtype) -> Params:
    """The layers' kernels and biases as they are computed with, once for all microbatches.

    The embedding, the head and the norms stay: gradients of many tokens are summed into them.
    """

    def one(path, x: Array) -> Array:
        return x.astype(dtype) if path[-1].key in ("kernel", "bias") else x

    return params | {"layers": jax.tree_util.tree_map_with_path(one, params["layers"])}


# By module, what `joined` makes of which dense layers.
_JOINED = {"attention": ("qkv", ("q", "k", "v")), "mlp": ("gate_up", ("gate", "up"))}


def joined(
    layer: Params, join: Callable[..., Any] = lambda *xs: jnp.concatenate(xs, axis=-1)
) -> Params:
    """One layer's weights, those that are multiplied with the same states side by side.

    Of few tokens one product is faster than its parts. `join` puts arrays of all parts together.
    """
    for module, (name, parts) in _JOINED.items():
        dense = dict(layer[module])
        trees = [dense.pop(part) for part in parts]
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        dense[name] = jax.tree.map(join, *trees, is_leaf=is_axes)
        layer = layer | {module: dense}
    return layer


def _embed(params: Params, ids: Array, dtype) -> Array:
    table = params["embed"]["embedding"]
    if isinstance(table, quantize.Int8):
        return (table.codes[ids] * table.scale[ids][..., None]).astype(dtype)
    return table[ids].astype(dtype)


def _final_norm(
    params: Params, config: ModelConfig, x: Array | Sum, dtype, kind: Any = nn.RMSNorm
) -> Array:
    norm = functools.partial(_norm(config, dtype, kind=kind).apply, {"params": params["norm"]})
    return _normed(norm, x)[1]


def _layer_windows(config: ModelConfig) -> Array | None:
    """Window of each layer, int32 [L], for a scan over layers; None when no layer has one."""
    if config.window_per_layer is None:
        return None
    whole = np.iinfo(np.int32).max
    return jnp.array([whole if w is None else w for w in config.window_per_layer], jnp.int32)


def _run_layers(body, carry, params: Params, config: ModelConfig, remat: str, scan: bool):
    """The layers one after the other; `remat` as in `config.model`; `scan`: in a loop.

    A loop copies what it keeps of each layer into arrays of all, which it begins with zeros.
    """
    if remat != "none":
        # Inside a scan nothing else could be merged with what is computed again; else XLA would
        # keep what it is not to.
        policies = jax.checkpoint_policies
        dots = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,  # attention's have some
            policies.save_only_these_names(merged.KEPT),
        )
        policy = dots if remat == "dots" else None
        body = jax.checkpoint(body, policy=policy, prevent_cse=not scan)
    layers = (params["layers"], _layer_windows(config))
    return jax.lax.scan(body, carry, layers, unroll=1 if scan else config.num_layers)


def score(
    params: Params,
    config: ModelConfig,
    prompt_PQ: Array,
    prompt_length_P: Array,
    completion_PGC: Array,
    layout: tuple[Array, Array] | None = None,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    scan: bool = True,
    place: Place = lambda x, axes: x,
    apart: ByRow | None = None,
    kernels: Kernels = attention,
) -> Array:
    """The hidden states that predict the completions' tokens; every prompt is computed once.

    Without a layout [P, G, C, D]: entry [p, g, c] predicts completion token c. With one, the
    (token_RX, lane_PLT) of `algorithm/packing.py`, [R, M * G + X, D] for R rows of M prompts: first
    the states that predict each completion's first token, which are the prompts' last, then those
    of the row's entries. Prompts and completions are padded on the right; the states of padding
    and of empty entries mean nothing. `place` is given activations with their logical axes;
    `kernels` compute the attention.
    """
    num_prompts, group, tokens = completion_PGC.shape
    if layout is None:  # a row for each prompt, a lane for each completion
        own_GT = np.arange(group)[:, None] * tokens + np.arange(1, tokens)
        token_RX = jnp.broadcast_to(own_GT.reshape(1, -1), (num_prompts, own_GT.size))
        lanes = _Lanes(num_prompts, (num_prompts, group, tokens - 1))
    else:
        token_RX, lane_PLT = layout
        lanes = _Lanes.of(lane_PLT, *token_RX.shape)
    by_row = lambda x, *shape: x.reshape(token_RX.shape[0], *shape)  # noqa: E731
    place_RX = jnp.maximum(token_RX - 1, 0)  # of the token that an entry reads
    input_RX = jnp.take_along_axis(by_row(completion_PGC, -1), place_RX, axis=1)
    length_RX = jnp.take_along_axis(
        by_row(prompt_length_P, -1), place_RX // (group * tokens), axis=1
    )
    position_RX = place_RX % tokens
    position_PLT = lanes.spread(position_RX)
    segment_PLT = lanes.spread(place_RX // tokens + 1)  # 0: none
    at_PQ = jnp.broadcast_to(jnp.arange(prompt_PQ.shape[1]), prompt_PQ.shape)
    position = jnp.concatenate([by_row(at_PQ, -1), length_RX + position_RX], axis=1)
    angles = attention.rotary(position, rotary_frequencies(config))
    ids = jnp.concatenate([by_row(prompt_PQ, -1), input_RX], axis=1)
    begin, block = ids.shape[1] - token_RX.shape[1], Block(config, dtype)
    row_axis = apart.axis if apart else "shard_rows"
    by_token, by_head = (row_axis, "tokens"), (row_axis, None, "attention_heads", None)
    split = lambda x: place(x, (*by_token, None))  # noqa: E731
    rows = Rows.placed(place, row_axis) if apart else UNDIVIDED
    axes = logical_axes(config)
    layer_axes = jax.tree.map(
        lambda names: names[1:], axes["layers"], is_leaf=lambda x: isinstance(x, tuple)
    )
    to_heads = lambda x: place(place(x, (*by_token, "heads", None)), by_head)  # noqa: E731
    to_tokens = lambda x: place(place(x, by_head), (*by_token, "heads", None))  # noqa: E731

    def gathered(params: Params, axes: Params) -> Params:
        return jax.tree.map(apart.gather, params, axes) if apart else params

    def layer(x, layer_and_window):
        params, window = layer_and_window
        params = gathered(params, layer_axes)

        def attend(q, k, v):
            q, k = (attention.rotate(y, angles) for y in (q, k))
            q, k, v = map(to_heads, (q, k, v))
            prompts = [y[:, :begin].reshape(*prompt_PQ.shape, *y.shape[2:]) for y in (q, k, v)]
            out_PQNH = kernels.causal(*prompts, prompt_length_P, window)
            out = by_row(out_PQNH, -1, *q.shape[2:])
            if token_RX.shape[1]:
                out_PLTNH = kernels.shared_prefix(
                    *(lanes.spread(y[:, begin:]) for y in (q, k, v)),
                    segment_PLT,
                    *prompts[1:],
                    prompt_length_P,
                    position_PLT,
                    window,
                )
                out = jnp.concatenate([out, lanes.gather(out_PLTNH)], axis=1)
            return to_tokens(out), None

        x, _ = block.apply({"params": params}, split(x), attend, rows)
        return split(x), None

    embed = gathered(params["embed"], axes["embed"])
    x = _embed({"embed": embed}, ids, dtype)
    if not apart:  # as the table is split; else XLA may send all shards' tokens to all
        x = place(x, (None, "tokens", "embed"))
    x = rows.split(rows.whole(x))
    x, _ = _run_layers(layer, x, params, config, remat, scan)
    x_PQD = x[:, :begin].reshape(*prompt_PQ.shape, -1)
    last_PD = jnp.take_along_axis(x_PQD, (prompt_length_P - 1)[:, None, None], axis=1)[:, 0]
    first_PGD = jnp.broadcast_to(last_PD[:, None], (num_prompts, group, config.width))
    if layout is None:
        own_PGTD = x[:, begin:].reshape(num_prompts, group, tokens - 1, config.width)
        states = jnp.concatenate([first_PGD[:, :, None], own_PGTD], axis=2)
    else:
        states = jnp.concatenate([by_row(first_PGD, -1, config.width), x[:, begin:]], axis=1)
    return _final_norm(params, config, states, dtype)


@dataclasses.dataclass(frozen=True)
class _Lanes:
    """Between the entries of rows [R, X, ...] and the lanes [P, L, T, ...] that attention sees."""

    rows: int
    shape: tuple[int, int, int]  # P, L, T
    entry_RY: Array | None = None  # of each place in a row's lanes, Y = P / R * L * T; -1: none
    place_RX: Array | None = None  # of each entry, the inverse. None for both: they are the same

    @staticmethod
    def of(lane_PLT: Array, rows: int, entries: int) -> _Lanes:
        if lane_PLT.size == rows * entries:  # an entry is a place
            return _Lanes(rows, lane_PLT.shape)
        entry_RY = lane_PLT.reshape(rows, -1)

        def inverse(entry_Y: Array) -> Array:
            at_Y = jnp.where(entry_Y < 0, entries, entry_Y)  # past the end: dropped
            place_Y = jnp.arange(len(entry_Y), dtype=jnp.int32)
            return jnp.full(entries, -1, jnp.int32).at[at_Y].set(place_Y, mode="drop")

        return _Lanes(rows, lane_PLT.shape, entry_RY, jax.vmap(inverse)(entry_RY))

    def spread(self, x: Array) -> Array:
        """Entries [R, X, ...] laid out in lanes, zeros where there is none."""
        if self.entry_RY is not None:
            x = _moved(x, self.entry_RY, self.place_RX)
        return x.reshape(*self.shape, *x.shape[2:])

    def gather(self, x: Array) -> Array:
        """The inverse: what stands in lanes by entry [R, X, ...], zeros for empty ones."""
        if self.entry_RY is None:
            return x.reshape(self.rows, -1, *x.shape[3:])
        x = x.reshape(*self.entry_RY.shape, *x.shape[3:])
        return _moved(x, self.place_RX, self.entry_RY)


@jax.custom_vjp
def _moved(x: Array, source: Array, target: Array) -> Array:
    """Entry `source[r, y]` of x [R, X, ...] at y, zeros for -1; `target` is the inverse.

    The gradient moves back by the inverse: of a plain lookup it is a sum into places, which is slow
    everywhere and in no certain order on a GPU.
    """
    if not x.shape[1]:  # completions of one token have no entries
        return jnp.zeros((*source.shape, *x.shape[2:]), x.dtype)
    y = jax.vmap(lambda row, at: row[at])(x, jnp.maximum(source, 0))
    there = (source >= 0).reshape(*source.shape, *(1,) * (x.ndim - 2))
    return jnp.where(there, y, 0)


_moved.defvjp(
    lambda x, source, target: (_moved(x, source, target), (source, target)),
    lambda where, y: (_moved(y, *where[::-1]), None, None),
)


def prefill(
    params: Params,
    config: ModelConfig,
    prompt_RQ: Array,
    length_R: Array,
    *,
    dtype=jnp.float32,
    rows: Rows = UNDIVIDED,
    caching: Any = attention.RING,
) -> tuple[Array, tuple]:
    """Hidden state of each prompt's last token [R, D], and the prompts' cache by layer."""
    t_Q = jnp.arange(prompt_RQ.shape[1])
    angles = attention.rotary(t_Q[None], rotary_frequencies(config))
    block = Block(config, dtype)

    windows = config.window_per_layer or (None,) * config.num_layers
    x_RQD, cache = rows.split(_embed(params, prompt_RQ, dtype)), []
    for layer, window in zip(params["layers"], windows, strict=True):

        def attend(q, k, v, window=window):
            q, k = (attention.rotate(y, angles) for y in (q, k))
            out = attention.causal(q, k, v, length_R, window)
            return out, caching.of_prompt(k, v)

        x_RQD, kept = block.apply({"params": layer}, x_RQD, attend, rows)
        cache.append(kept)
    last_RD = jnp.take_along_axis(x_RQD, (length_R - 1)[:, None, None], axis=1)[:, 0]
    return rows.whole(_final_norm(params, config, last_RD, dtype)), tuple(cache)


def decode_token(
    params: Params,
    config: ModelConfig,
    token_RW: Array,
    cache: tuple,
    prompt_length_R: Array,
    time_RW: Array,
    live_RW: Array,
    column: Array,
    limit: int,
    *,
    dtype=jnp.float32,
    rows: Rows = UNDIVIDED,
    caching: Any = attention.RING,
    norm: Any = nn.RMSNorm,
) -> tuple[Array, tuple]:
    """Hidden state after one more token per lane [R, W, D], and the cache by layer with it.

    `token_RW` stands at position `time_RW` of its completion of at most `limit` tokens, and goes
    into `column` of a ring. What lanes give that are not live means nothing.
    """
    angles = attention.rotary(prompt_length_R[:, None] + time_RW, rotary_frequencies(config))
    windows = config.window_per_layer or (None,) * config.num_layers
    block = Block(config, dtype, norm)
    x_RWD = rows.split(_embed(params, token_RW, dtype))
    cache = list(cache)
    for i, layer in enumerate(params["layers"]):

        def attend(q, k, v, i=i):
            where = prompt_length_R, time_RW, live_RW, column, limit, windows[i]
            out, cache[i] = caching.extend(cache[i], q, k, v, angles, *where)
            return out, None

        x_RWD, _ = block.apply({"params": layer}, x_RWD, attend, rows)
    return rows.whole(_final_norm(params, config, x_RWD, dtype, norm)), tuple(cache)
