"""Decoding's attention on NVIDIA GPUs, by a kernel that reads each key and value once.

Plain XLA writes the scores of all columns to memory and reads them several times; here a block of
keys goes through the softmax while it is on the chip (Dao et al. 2022, arXiv:2205.14135), and
columns without a token are not read. The prompt's part, whose keys all lanes of a slot share, and
each lane's own are merged by their log-sum-exp. Written in Pallas for Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.models import attention, quantize
from grpo_jax.models.attention import Cache
from grpo_jax.models.quantize import Int8
from grpo_jax.structs import Array, ModelConfig

_BLOCKS = (64, 32, 16)  # positions in a block; the first that divides
_WARPS, _STAGES = 4, 3  # of a program: groups of 32 threads, and blocks on their way
_LEAST, _MOST = 16, 64  # queries of a program
_HIDDEN = -1e30


def obstacle(model: ModelConfig, mesh: Mesh, dtype: Any) -> str:
    """Why the kernel cannot be had, or nothing."""
    if not sharding.is_gpu(mesh):
        return f"it is for NVIDIA GPUs, and the devices are {mesh.devices.flat[0].platform}s"
    if mesh.shape["tensor"] > 1:
        return (
            f"mesh.tensor = {mesh.shape['tensor']} splits the heads, which XLA does with no kernel"
        )
    if model.window_per_layer is not None:
        return "the model has sliding windows"
    if model.head_size not in (32, 64, 128, 256):
        return f"the heads are of size {model.head_size}, and it takes 32, 64, 128 or 256"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it takes bfloat16, and model.dtype is {jnp.dtype(dtype)}"
    try:
        _triton()
    except ImportError:
        return f"JAX {jax.__version__} has no Pallas for Triton"
    return ""


@dataclasses.dataclass(frozen=True)
class Streamed(attention.Ring):
    """As `attention.Ring`, but keys stand as values do, [..., positions, H]; no windows."""

    interpret: bool = False  # anywhere, for a test

    def empty(
        self, slots: int, lanes: int, prompt_tokens: int, limit: int, heads: int, size: int, dtype
    ) -> tuple[Cache, Cache]:
        def make(shape: tuple[int, ...], positions: int) -> Cache:
            shape = (*shape, positions, size)
            if not self.int8:
                return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
            codes = Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1]))
            return codes, codes

        own = _blocks(limit) * _BLOCKS[0]
        return make((slots, heads), prompt_tokens), make((slots, heads, lanes), own)

    def of_prompt(self, k_RQKH: Array, v_RQKH: Array) -> Cache:
        """A prompt's keys and values [R, K, Q, H]."""
        keys, values = (jnp.swapaxes(x, 1, 2) for x in (k_RQKH, v_RQKH))
        return (quantize.int8(keys, 3), quantize.int8(values, 3)) if self.int8 else (keys, values)

    def extend(
        self,
        cache: tuple[Cache, Cache],
        q_RWNH: Array,
        k_RWKH: Array,
        v_RWKH: Array,
        prompt_length_R: Array,
        time_RW: Array,
        live_RW: Array,
        column: Array,
        limit: int,
        window: int | None,
    ) -> tuple[Array, tuple[Cache, Cache]]:
        """One new token per lane: what it attends to [R, W, N, H], and the cache with it."""
        assert window is None, "there is no window in the kernel"
        prefix, own = (
            cache[0],
            tuple(self._write(kept, new, column) for kept, new in zip(cache[1], (k_RWKH, v_RWKH))),
        )
        q_RWKnH = attention.grouped(q_RWNH, k_RWKH.shape[2])
        # What a lane that is not live gives means nothing: it reads one block.
        last_RW = jnp.where(live_RW, time_RW, 0)
        run = functools.partial(_attend, q_RWKnH, interpret=self.interpret)
        first = run(*prefix, _range(prompt_length_R[:, None] - 1), _positions(prefix))
        out_RWKnH = run(*own, _range(last_RW, column), limit, after=first)
        return out_RWKnH.reshape(q_RWNH.shape), (prefix, own)

    def _write(self, kept: Array | Int8, new_RWKH: Array, column: Array) -> Array | Int8:
        """With one position more in every lane, the same for all."""
        new = jnp.swapaxes(new_RWKH, 1, 2)[..., None, :]
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=3)
        if isinstance(kept, Int8):
            new = quantize.int8(new, 4)
            return Int8(put(kept.codes, new.codes), put(kept.scale, new.scale))
        return put(kept, new)


def share_read(tokens_B: np.ndarray, steps: int, lanes: int, limit: int) -> float:
    """The mean share of the lanes' own cache that one step reads, of so many steps.

    `tokens_B`: how many tokens each completion decodes in some lane; what is left is idle, and
    reads one block.
    """
    whole_B, rest_B = np.divmod(tokens_B.astype(np.int64), _BLOCKS[0])
    blocks_B = _BLOCKS[0] * whole_B * (whole_B + 1) // 2 + rest_B * (whole_B + 1)
    idle = max(steps * lanes - int(tokens_B.sum()), 0)
    return (int(blocks_B.sum()) + idle) / max(steps * lanes * _blocks(limit), 1)


def _blocks(limit: int) -> int:
    """Of a lane's own cache."""
    return -(-limit // _BLOCKS[0])


def _positions(cache: Cache) -> int:
    values = cache[1]
    return (values.codes if isinstance(values, Int8) else values).shape[-2]


def _range(last: Array, column: Array | None = None) -> Array:
    """The last of some positions, counted from the first, and the column where it stands."""
    return jnp.stack(jnp.broadcast_arrays(last, last if column is None else column), axis=-1)


def _attend(
    q_RWKnH: Array,
    k: Array | Int8,
    v: Array | Int8,
    range_RX2: Array,
    limit: int,
    *,
    after: tuple[Array, Array] | None = None,
    interpret: bool,
) -> Any:
    """Queries over the positions of a range, which goes round the end at `limit`.

    Without `after` those are their slot's, keys and values [R, K, positions, H] and ranges
    [R, 1, 2], and what is returned is an output, float32 [R, W, K, n, H], and the log-sum-exp of
    the scores [R, W, K, n]. `after` is that: the positions are each lane's, [R, K, W, positions, H]
    and [R, W, 2], and the output of both together is returned, as the queries are.
    """
    slots, lanes, heads, queries, size = q_RWKnH.shape
    of_lanes = after is not None
    rows, together = _power_of_two(queries), 1  # queries of a lane, and lanes of a program
    if not of_lanes:
        together = min(_power_of_two(lanes), max(1, _MOST // rows))
    rows = max(rows, _LEAST // together)
    kept = [x for y in (k, v) for x in ((y.codes, y.scale) if isinstance(y, Int8) else (y,))]
    positions = kept[0].shape[-2]

    def by_query(*end: int) -> pl.BlockSpec:
        lane, zeros = None if of_lanes else together, (0,) * len(end)
        return pl.BlockSpec((None, lane, None, rows, *end), lambda r, w, h: (r, w, h, 0, *zeros))

    def by_key(x: Array) -> pl.BlockSpec:
        lead = 3 if of_lanes else 2
        rest, zeros = x.shape[lead:], (0,) * (x.ndim - lead)
        return pl.BlockSpec(
            (None,) * lead + rest, lambda r, w, h: ((r, h, w) if of_lanes else (r, h)) + zeros
        )

    ranges = pl.BlockSpec((None, None, 2), lambda r, w, h: (r, w if of_lanes else 0, 0))
    outs = [(by_query(size), q_RWKnH.shape), (by_query(), q_RWKnH.shape[:-1])]
    outs = outs[: 1 if of_lanes else 2]
    dtype = q_RWKnH.dtype if of_lanes else jnp.float32
    options: dict[str, Any] = {"interpret": True}
    if not interpret:
        triton = _triton().CompilerParams(num_warps=_WARPS, num_stages=_STAGES)
        options = {"compiler_params": triton}
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            there=(queries,) if of_lanes else (lanes, queries),
            block=next(b for b in _BLOCKS if positions % b == 0),
            limit=limit,
            int8=isinstance(k, Int8),
        ),
        grid=(slots, -(-lanes // together), heads),
        in_specs=[
            *(ranges, by_query(size)),
            *map(by_key, kept),
            *((by_query(size), by_query()) if of_lanes else ()),
        ],
        out_specs=[spec for spec, _ in outs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape in outs],
        name="attend",
        **options,
    )(range_RX2.astype(jnp.int32), q_RWKnH, *kept, *(after or ()))
    return found[0] if of_lanes else tuple(found)


def _power_of_two(number: int) -> int:
    """The first that is no less."""
    return 1 << (number - 1).bit_length()


def _triton() -> Any:
    with warnings.catch_warnings():  # deprecated, and what there is
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton
    return triton


def _kernel(range_ref, q_ref, *refs, there: tuple[int, ...], block: int, limit: int, int8: bool):
    """One program: all queries of some positions, block by block.

    `there`: queries, or lanes and queries of each, that the blocks of queries are padded from.
    """
    triton = _triton()
    *shape, size = q_ref.shape
    at = [jax.lax.broadcasted_iota(jnp.int32, tuple(shape), axis) for axis in range(len(shape))]
    if len(shape) == 2:  # the lanes of this program
        at[0] += pl.program_id(1) * shape[0]
    is_there = functools.reduce(jnp.logical_and, [x < n for x, n in zip(at, there)])
    is_there_H = jnp.broadcast_to(is_there[..., None], (*shape, size))
    rows = math.prod(shape)
    read = lambda ref, *end: triton.load(  # noqa: E731
        ref, mask=is_there_H if end else is_there, other=0.0
    ).reshape(rows, *end)
    q_MH = read(q_ref, size)
    number_of_kept = 4 if int8 else 2
    kept, refs = refs[:number_of_kept], refs[number_of_kept:]
    *after, out_ref, lse_ref = refs if len(refs) == 2 else (*refs, None)
    if after:
        out_MH, top_M = read(after[0], size), read(after[1])
        start = out_MH, top_M, jnp.ones((rows,), jnp.float32)
    else:
        zeros = jnp.zeros((rows, size), jnp.float32)
        start = zeros, jnp.full((rows,), _HIDDEN, jnp.float32), jnp.zeros((rows,), jnp.float32)
    last, column = range_ref[0], range_ref[1]
    past = jnp.maximum(last - column, 0)  # how many stand before the ring's end
    first = jnp.maximum(column - last, 0) // block
    begin = (limit - past) // block
    upto = column // block + 1 - first
    blocks = upto + jnp.where(past > 0, (limit - 1) // block + 1 - begin, 0)

    def one_block(i, carry):
        out_MH, top_M, sum_M = carry
        is_past = i >= upto
        start = jnp.where(is_past, begin + i - upto, first + i) * block
        at_B = start + jnp.arange(block)
        seen_B = jnp.where(
            is_past,
            (at_B >= limit - past) & (at_B < limit),
            (at_B >= column - last) & (at_B <= column),
        )
        here = pl.ds(start, block)
        score_MB = triton.dot(q_MH, kept[0][here, :].astype(q_MH.dtype).T)
        if int8:
            score_MB *= kept[1][here][None]
        score_MB = jnp.where(seen_B[None], score_MB, _HIDDEN)
        new_top_M = jnp.maximum(top_M, score_MB.max(axis=1))
        weight_MB = jnp.exp(score_MB - new_top_M[:, None])
        less_M = jnp.exp(top_M - new_top_M)
        sum_M = less_M * sum_M + weight_MB.sum(axis=1)
        if int8:
            weight_MB *= kept[3][here][None]
        values_BH = kept[number_of_kept // 2][here, :].astype(q_MH.dtype)
        out_MH = less_M[:, None] * out_MH + triton.dot(weight_MB.astype(q_MH.dtype), values_BH)
        return out_MH, new_top_M, sum_M

    out_MH, top_M, sum_M = jax.lax.fori_loop(0, blocks, one_block, start)
    out = (out_MH / sum_M[:, None]).reshape(*shape, size)
    triton.store(out_ref, out.astype(out_ref.dtype), mask=is_there_H)
    if lse_ref is not None:
        triton.store(lse_ref, (top_M + jnp.log(sum_M)).reshape(shape), mask=is_there)
