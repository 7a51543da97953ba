"""Attention in decoding on NVIDIA GPUs: a kernel that reads each key and value once.

Plain XLA writes the scores of all columns to memory and reads them several times; here the softmax
is computed block by block on the chip (Dao et al. 2022, arXiv:2205.14135), and columns without a
token are not read. Attention to the prompt, whose keys all lanes of a slot share, and to each
lane's own tokens are merged by their log-sum-exp. The kernel also writes the new token's key and
value into the cache. Inside a program, M are its queries and B the positions of a block of keys.
Written in Pallas for Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh

from grpo_jax.kernels import fused_attention, pallas_triton, quantize
from grpo_jax.kernels.kv_cache import Cache, CacheShape, DecodeStep, RingCache
from grpo_jax.kernels.quantize import Int8
from grpo_jax.structs import Array, ModelConfig

_BLOCKS = (64, 32, 16)  # positions in a block: the first that divides the cache
_WARPS, _STAGES = 4, 3  # of a program: warps, and blocks in flight
_LEAST, _MOST = 16, 64  # queries of a program
_HIDDEN = -1e30


def why_unavailable(model: ModelConfig, mesh: Mesh, dtype: Any) -> str:
    """The reason why the kernel cannot be used; "" if it can."""
    if in_general := pallas_triton.why_unavailable(mesh, dtype):
        return in_general
    if model.has_windows:
        return "the model has sliding windows"
    if model.head_size not in (32, 64, 128, 256):
        return f"the heads are of size {model.head_size}, and it takes 32, 64, 128 or 256"
    return fused_attention.why_uncapped(model)


@dataclasses.dataclass(frozen=True)
class TritonDecode(RingCache):
    """A `RingCache` with keys in the layout of values, [..., positions, H]; without windows."""

    interpret: bool = False  # runs on any device, for tests
    _KEY_AXIS: ClassVar[int] = -2

    def empty(self, shape: CacheShape, dtype: Any) -> tuple[Cache, Cache]:
        def make(lead: tuple[int, ...], positions: int) -> Cache:
            shape = (*lead, positions, head_size)
            if not self.int8:
                return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
            codes = Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1]))
            return codes, codes

        head_size, slots = shape.head_size, (shape.slots, shape.num_kv_heads)
        own = _blocks(shape.limit) * _BLOCKS[0]
        return make(slots, shape.prompt_tokens), make((*slots, shape.lanes), own)

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
        step: DecodeStep,
    ) -> tuple[Array, tuple[Cache, Cache]]:
        assert step.window is None, "there is no window in the kernel"
        prefix, own = cache
        heads = jnp.concatenate([q_RWNH, k_RWKH, v_RWKH], axis=2)  # the kernel splits them again
        # The output of an idle lane is not used: it reads none of its own cache, nor writes there.
        last_RW = jnp.where(step.live_RW, step.time_RW, -1)
        run = functools.partial(_attend, heads, step.cos_sin, interpret=self.interpret)
        first, _ = run(prefix, _range(step.prompt_length_R[:, None] - 1), _positions(prefix))
        (out_RWKnH,), own = run(own, _range(last_RW, step.column), step.limit, after=first)
        return out_RWKnH.reshape(q_RWNH.shape), (prefix, own)


def share_read(tokens_B: np.ndarray, steps: int, lanes: int, limit: int) -> float:
    """The share of the lanes' own cache that a decode step reads, the mean over `steps`.

    `tokens_B`: the number of tokens that each completion decodes, in any lane. A completion's first
    token reads nothing, and neither does an idle lane.
    """
    whole_B, rest_B = np.divmod(np.maximum(tokens_B.astype(np.int64) - 1, 0), _BLOCKS[0])
    blocks_B = _BLOCKS[0] * whole_B * (whole_B + 1) // 2 + rest_B * (whole_B + 1)
    return int(blocks_B.sum()) / max(steps * lanes * _blocks(limit), 1)


def _blocks(limit: int) -> int:
    """The number of blocks in a lane's own cache."""
    return -(-limit // _BLOCKS[0])


def _positions(cache: Cache) -> int:
    values = cache[1]
    return (values.codes if isinstance(values, Int8) else values).shape[-2]


def _range(last: Array, column: Array | None = None) -> Array:
    """Packs (last position, its ring column) for the kernel; -1: a lane that is not live."""
    return jnp.stack(jnp.broadcast_arrays(last, last if column is None else column), axis=-1)


def _attend(
    heads_RWNH: Array,
    cos_sin: tuple[Array, Array],
    cache: Cache,
    range_RX2: Array,
    limit: int,
    *,
    after: tuple[Array, Array] | None = None,
    interpret: bool,
) -> tuple[tuple[Array, ...], Cache]:
    """Attention of queries to a range of positions, which wraps around at `limit`; and the cache.

    `heads_RWNH`: a new token's queries, then its keys, then its values, unrotated; its angles are
    `cos_sin` [R, W, H/2]. Without `after` the cache is the prompts': keys and values [R, K,
    positions, H], ranges [R, 1, 2]. The result is the output, float32 [R, W, K, n, H], and the
    log-sum-exp of the scores [R, W, K, n]. `after` takes that result, and the cache is the
    completions': [R, K, W, positions, H], ranges [R, W, 2]. The result is then the output over
    prompt, completion and new token, in the dtype of the queries, and the cache with the new token.
    """
    slots, lanes, number, size = heads_RWNH.shape
    of_lanes = after is not None
    kept, structure = jax.tree.flatten(cache)
    heads, positions = kept[0].shape[1], kept[0].shape[-2]
    queries = (number - 2 * heads) // heads
    rows, together = pl.next_power_of_2(queries), 1  # queries of a lane, and lanes of a program
    if not of_lanes:
        together = min(pl.next_power_of_2(lanes), max(1, _MOST // rows))
    rows = max(rows, _LEAST // together)
    lane = None if of_lanes else together
    by_query = functools.partial(_by_query, lane, rows)
    of_kept = [_by_key(x, of_lanes) for x in kept]
    in_specs = [
        pl.BlockSpec((None, None, 2), lambda r, w, h: (r, w if of_lanes else 0, 0)),
        pl.BlockSpec((None, lane, number, size), lambda r, w, h: (r, w, 0, 0)),
        *[pl.BlockSpec((None, lane, size // 2), lambda r, w, h: (r, w, 0))] * 2,
        *of_kept,
    ]
    like, shape = jax.ShapeDtypeStruct, (slots, lanes, heads, queries)
    out_specs = [by_query(size), by_query()]
    out_shape = [like((*shape, size), jnp.float32), like(shape, jnp.float32)]
    if of_lanes:
        in_specs += out_specs
        out_specs = [by_query(size), *of_kept]
        out_shape = [like((*shape, size), heads_RWNH.dtype)]
        out_shape += [like(x.shape, x.dtype) for x in kept]
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            there=(queries,) if of_lanes else (lanes, queries),
            rows=rows,
            heads=heads,
            block=next(b for b in _BLOCKS if positions % b == 0),
            limit=limit,
            number_of_kept=len(kept),
        ),
        grid=(slots, -(-lanes // together), heads),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases={4 + i: 1 + i for i in range(len(kept))} if of_lanes else {},
        name="attend",
        **pallas_triton.options(interpret, num_warps=_WARPS, num_stages=_STAGES),
    )(range_RX2.astype(jnp.int32), heads_RWNH, *cos_sin, *kept, *(after or ()))
    if not of_lanes:
        return tuple(found), cache
    return tuple(found[:1]), jax.tree.unflatten(structure, found[1:])


def _by_query(lanes: int | None, rows: int, *end: int) -> pl.BlockSpec:
    """The block that a program sees of an array with a value [*end] for every query."""
    zeros = (0,) * len(end)
    return pl.BlockSpec((None, lanes, None, rows, *end), lambda r, w, h: (r, w, h, 0, *zeros))


def _by_key(x: Array, of_lanes: bool) -> pl.BlockSpec:
    """The block that a program sees of a cache: all positions of its slot, or lane, and head."""
    lead = 3 if of_lanes else 2
    rest, zeros = x.shape[lead:], (0,) * (x.ndim - lead)
    return pl.BlockSpec(
        (None,) * lead + rest, lambda r, w, h: ((r, h, w) if of_lanes else (r, h)) + zeros
    )


def _codes(parts: list[Array]) -> tuple[list[Array], Array]:
    """As `quantize.int8` for a vector in parts; Triton kernels have no rounding function."""
    scale = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in parts]) / 127
    step = jnp.where(scale == 0, 1.0, scale)
    return [jnp.floor(x / step + 0.5).astype(jnp.int8) for x in parts], scale


class _Queries(NamedTuple):
    """The queries M of one program, rotated and scaled, with their rotary angles and mask.

    Queries and keys are kept as two halves, [..., H/2] each, which a rotation mixes.
    """

    halves: list[Array]
    cos_sin: list[Array]  # of the new token of each lane
    is_there: Array  # bool [lanes, queries of each] or [queries]; their block is padded

    def read(self, ref: Any, *end: int) -> Array:
        """Reads another array with these queries, [..., *end]; padded queries are 0."""
        mask = self.is_there
        if end:
            mask = jnp.broadcast_to(mask[..., None], (*mask.shape, *end))
        return pallas_triton.module().load(ref, mask=mask, other=0.0)


def _halves(size: int) -> tuple[Any, Any]:
    return pl.ds(0, size // 2), pl.ds(size // 2, size // 2)


def _rotated(halves: list[Array], cos: Array, sin: Array) -> list[Array]:
    one, other = (x.astype(jnp.float32) for x in halves)
    return [one * cos - other * sin, other * cos + one * sin]


def _read_queries(heads_ref, cos_ref, sin_ref, there: tuple[int, ...], rows: int) -> _Queries:
    *lanes, _, size = heads_ref.shape
    shape = (*lanes, rows)
    at = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(len(shape))]
    if lanes:  # of this program
        at[0] += pl.program_id(1) * lanes[0]
    is_there = functools.reduce(jnp.logical_and, [x < n for x, n in zip(at, there)])
    if lanes:
        lane_W = pl.program_id(1) * lanes[0] + jnp.arange(lanes[0])
        of_lane = jnp.broadcast_to((lane_W < there[0])[:, None], cos_ref.shape)
        load = functools.partial(pallas_triton.module().load, mask=of_lane, other=0.0)
        cos_sin = [load(ref) for ref in (cos_ref, sin_ref)]
    else:
        cos_sin = [cos_ref[...], sin_ref[...]]
    raw = _Queries([], cos_sin, is_there)
    of_head = (*(slice(None),) * len(lanes), pl.ds(pl.program_id(2) * there[-1], rows))
    parts = [raw.read(heads_ref.at[(*of_head, half)], size // 2) for half in _halves(size)]
    parts = _rotated(parts, *(x[..., None, :] for x in cos_sin))
    scaled = [(x * size**-0.5).astype(heads_ref.dtype) for x in parts]
    return raw._replace(halves=[x.reshape(math.prod(shape), size // 2) for x in scaled])


def _add_token(
    heads_ref,
    first_ref,
    lse_ref,
    written: list[Any],
    column: Array,
    is_live: Array,
    heads: int,
    queries: _Queries,
) -> tuple[Array, Array, Array]:
    """Writes the new token to a live lane's cache; returns `_kernel`'s sums over the prompt and it.

    The program does not read it from the cache: the write is visible only after the program's end.
    """

    def put(ref: Any, x: Array) -> None:
        pallas_triton.module().store(ref, x, mask=jnp.broadcast_to(is_live, x.shape))

    (number, size), dtype, head = heads_ref.shape, heads_ref.dtype, pl.program_id(2)
    k = [heads_ref[number - 2 * heads + head, half] for half in _halves(size)]
    k = [x.astype(dtype).astype(jnp.float32) for x in _rotated(k, *queries.cos_sin)]
    v_H = heads_ref[number - heads + head].astype(jnp.float32)
    if len(written) == 4:  # in 8 bits
        codes, scale = _codes(k)
        (v_codes_H,), v_scale = _codes([v_H])
        put(written[1].at[column], scale)
        put(written[3].at[column], v_scale)
        put(written[2].at[column], v_codes_H)
        k, v_H = [x * scale for x in codes], v_codes_H * v_scale
    else:
        codes = [x.astype(dtype) for x in k]
        put(written[1].at[column], v_H.astype(dtype))
    for half, x in zip(_halves(size), codes):
        put(written[0].at[column, half], x)
    q = queries.halves
    score_M = sum(jnp.sum(x.astype(jnp.float32) * y[None], axis=1) for x, y in zip(q, k))
    lse_M = queries.read(lse_ref).reshape(score_M.shape)
    top_M = jnp.maximum(lse_M, score_M)
    before_M, weight_M = jnp.exp(lse_M - top_M), jnp.exp(score_M - top_M)
    first_MH = queries.read(first_ref, size).reshape(*score_M.shape, size)
    out_MH = before_M[:, None] * first_MH + weight_M[:, None] * v_H[None]
    return out_MH, top_M, before_M + weight_M


def _blocks_of_range(
    last: Array, column: Array, end: Array, limit: int, size: int
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """The number of blocks in a range of columns, and a function of a block's number.

    That function returns the block's first column and the mask of its columns in the range. The
    range ends at `column`, and has `last` columns before it, wrapping around at `limit`. `end` is
    the first column past it: `column` itself, or the next.
    """
    past = jnp.maximum(last - column, 0)  # columns of the range before the ring's end
    from_here = jnp.maximum(column - last, 0)
    first, begin = from_here // size, (limit - past) // size
    upto = jnp.where(end > from_here, pl.cdiv(end, size) - first, 0)
    number = upto + jnp.where(past > 0, (limit - 1) // size + 1 - begin, 0)

    def columns(i: Array) -> tuple[Array, Array]:
        is_past = i >= upto
        start = jnp.where(is_past, begin + i - upto, first + i) * size
        at_B = start + jnp.arange(size)
        past_B = (at_B >= limit - past) & (at_B < limit)
        return start, jnp.where(is_past, past_B, (at_B >= column - last) & (at_B < end))

    return number, columns


def _kernel(
    range_ref,
    heads_ref,
    cos_ref,
    sin_ref,
    *refs,
    there: tuple[int, ...],
    rows: int,
    heads: int,
    block: int,
    limit: int,
    number_of_kept: int,
):
    """One program: all queries of some positions, block by block.

    `there`: the number of queries, or of lanes and of queries in each, without padding. The running
    sums are the weighted values, the largest score, and the weights after it is subtracted.
    """
    gpu = pallas_triton.module()
    int8, of_lanes = number_of_kept == 4, len(there) == 1
    dtype, size = heads_ref.dtype, heads_ref.shape[-1]
    queries = _read_queries(heads_ref, cos_ref, sin_ref, there, rows)
    kept, refs = refs[:number_of_kept], refs[number_of_kept:]
    last, column = range_ref[0], range_ref[1]
    if of_lanes:
        first_ref, lse_ref, out_ref, *written = refs
        before = heads_ref, first_ref, lse_ref
        sums = _add_token(*before, written, column, last >= 0, heads, queries)
        end = column
    else:
        out_ref, lse_ref = refs
        number = math.prod(queries.is_there.shape)
        zeros = jnp.zeros((number, size), jnp.float32)
        hidden = jnp.full((number,), _HIDDEN, jnp.float32)
        sums = zeros, hidden, jnp.zeros((number,), jnp.float32)
        end = column + 1
    number_of_blocks, columns = _blocks_of_range(last, column, end, limit, block)

    def one_block(i, sums):
        out_MH, top_M, sum_M = sums
        start, seen_B = columns(i)
        here = pl.ds(start, block)
        score_MB = sum(
            gpu.dot(x, kept[0][here, half].astype(dtype).T)
            for x, half in zip(queries.halves, _halves(size))
        )
        if int8:
            score_MB *= kept[1][here][None]
        score_MB = jnp.where(seen_B[None], score_MB, _HIDDEN)
        new_top_M = jnp.maximum(top_M, score_MB.max(axis=1))
        weight_MB = jnp.exp(score_MB - new_top_M[:, None])
        less_M = jnp.exp(top_M - new_top_M)
        sum_M = less_M * sum_M + weight_MB.sum(axis=1)
        if int8:
            weight_MB *= kept[3][here][None]
        values_BH = kept[number_of_kept // 2][here, :].astype(dtype)
        out_MH = less_M[:, None] * out_MH + gpu.dot(weight_MB.astype(dtype), values_BH)
        return out_MH, new_top_M, sum_M

    out_MH, top_M, sum_M = jax.lax.fori_loop(0, number_of_blocks, one_block, sums)
    is_there = queries.is_there
    out = (out_MH / sum_M[:, None]).reshape(*is_there.shape, size)
    of_query = jnp.broadcast_to(is_there[..., None], out.shape)
    gpu.store(out_ref, out.astype(out_ref.dtype), mask=of_query)
    if not of_lanes:
        gpu.store(lse_ref, (top_M + jnp.log(sum_M)).reshape(is_there.shape), mask=is_there)
