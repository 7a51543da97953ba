"""The KV cache, and how a new token attends to it, in plain XLA.

Besides the axes of `structs.py`, A are prompts that are admitted to slots.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from grpo_jax.kernels import attention, quantize, rotary
from grpo_jax.kernels.primitives import split_index, where
from grpo_jax.kernels.quantize import Int8
from grpo_jax.structs import Array


class CacheShape(NamedTuple):
    """The size of one layer's cache."""

    slots: int
    lanes: int  # of a slot
    prompt_tokens: int
    limit: int  # tokens of a completion, at most
    num_kv_heads: int
    head_size: int


@struct.dataclass
class DecodeStep:
    """The decode step that adds one token to every lane, as the cache needs it."""

    prompt_length_R: Array
    time_RW: Array  # int32: the new token's position in its completion
    live_RW: Array  # bool; the output of other lanes is not used
    column: Array  # int32: where the ring takes every lane's new token
    limit: int = struct.field(pytree_node=False)  # tokens of a completion, at most
    # For one layer; `transformer.decode_token` sets them.
    cos_sin: tuple[Array, Array] | None = None  # rotary angles of the new tokens, [R, W, H/2]
    window: int | None = struct.field(pytree_node=False, default=None)
    cap: float | None = struct.field(pytree_node=False, default=None)  # of the scores
    # Whether lanes that are not live keep their past, for later turns.
    keeps: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Chunk:
    """M tokens that are added to every lane at once, as the cache needs them.

    A lane gets `count_RW` tokens, in one chunk or in several that follow each other. They stand on
    the right: those of the last chunk end with the lanes' last token, and a lane that gets fewer
    than others has padding on the left. The age of a token is the number of tokens after it.
    """

    prompt_length_R: Array
    length_RW: Array  # int32: own tokens of a lane, with all that it gets
    count_RW: Array  # int32: how many it gets; 0: its cache stays as it is
    age: Array  # int32: of the chunk's last token
    column: Array  # int32: ring column after the last token of all
    limit: int = struct.field(pytree_node=False)  # as in `DecodeStep`, like what follows
    cos_sin: tuple[Array, Array] | None = None  # [R, W, M, H/2]
    window: int | None = struct.field(pytree_node=False, default=None)
    cap: float | None = struct.field(pytree_node=False, default=None)

    def ages(self, tokens: int) -> Array:
        """The age of each of a chunk's tokens, int32 [M]."""
        return self.age + jnp.arange(tokens - 1, -1, -1)

    def positions(self, tokens: int) -> Array:
        """The tokens' positions, those of the prompt included, int32 [R, W, M]."""
        last_RW1 = (self.prompt_length_R[:, None] + self.length_RW - 1)[..., None]
        return jnp.maximum(last_RW1 - self.ages(tokens)[None, None], 0)

    def is_there(self, tokens: int) -> Array:
        """False for padding, bool [R, W, M]."""
        return self.ages(tokens)[None, None] < self.count_RW[..., None]


class KVCache(abc.ABC):
    """A layout of a layer's keys and values, and the attention of a new token to them.

    The cache itself is a pytree of arrays, made by `empty`, whose first axis is the slots.
    """

    @abc.abstractmethod
    def empty(self, shape: CacheShape, dtype: Any) -> Any:
        """An empty cache."""

    @abc.abstractmethod
    def of_prompt(self, k_RQKH: Array, v_RQKH: Array) -> Any:
        """The rotated keys and the values of prompts, in the layout of the cache."""

    @abc.abstractmethod
    def admit(self, cache: Any, prompt: Any, slot_A: Array, length_A: Array, lanes: int) -> Any:
        """The cache with prompts written to their slots; a slot number past the last is ignored."""

    @abc.abstractmethod
    def extend(
        self, cache: Any, q_RWNH: Array, k_RWKH: Array, v_RWKH: Array, step: DecodeStep
    ) -> tuple[Array, Any]:
        """Attention of one new token per lane [R, W, N, H], and the cache with that token.

        Queries and keys come unrotated; `step.cos_sin` has their angles. With `step.keeps` the past
        of a lane that is not live stays as it is.
        """

    @abc.abstractmethod
    def align(self, cache: Any, shift_RW: Array, limit: int) -> Any:
        """The cache with each lane's own tokens so many columns further along the ring."""

    @abc.abstractmethod
    def append(
        self, cache: Any, q_RWMNH: Array, k_RWMKH: Array, v_RWMKH: Array, chunk: Chunk
    ) -> tuple[Array, Any]:
        """Attention of a chunk's tokens [R, W, M, N, H], and the cache with those tokens.

        Queries and keys come unrotated. What a lane has before ends in the ring where what it gets
        begins; see `align`.
        """

    @abc.abstractmethod
    def compact(self, cache: Any, slot_R: Array, lane_RW: Array, lanes: int, limit: int) -> Any:
        """A smaller cache: slot r has old slot `slot_R[r]`'s prompt, and its lanes `lane_RW[r]`."""

    @abc.abstractmethod
    def put_back(self, cache: Any, smaller: Any, slot_RW: Array, lane_RW: Array, limit: int) -> Any:
        """The cache that `compact` made smaller, with those lanes as they are there.

        A slot number past the last is ignored.
        """


# Keys are stored transposed, [..., K, H, positions]: 1.4 times as fast as positions first on CPU,
# where one query is multiplied with many keys.
Cache = tuple[Array | Int8, Array | Int8]  # keys and values; int8: a scale per head and position


def prefix_cache(k_RQKH: Array, v_RQKH: Array, *, int8: bool = False) -> Cache:
    """A prompt's keys [R, K, H, Q] and values [R, K, Q, H], as `decode` reads them."""
    keys, values = jnp.transpose(k_RQKH, (0, 2, 3, 1)), jnp.transpose(v_RQKH, (0, 2, 1, 3))
    return (quantize.int8(keys, 2), quantize.int8(values, 3)) if int8 else (keys, values)


def empty_cache(shape: tuple[int, ...], positions: int, size: int, dtype, *, int8: bool) -> Cache:
    """Zeros: keys [*shape, H, positions] and values [*shape, positions, H]."""
    keys, values = (*shape, size, positions), (*shape, positions, size)
    if not int8:
        return jnp.zeros(keys, dtype), jnp.zeros(values, dtype)
    scale = jnp.zeros((*shape, positions))
    return Int8(jnp.zeros(keys, jnp.int8), scale), Int8(jnp.zeros(values, jnp.int8), scale)


def write(
    cache: Cache, k_RWKH: Array, v_RWKH: Array, column: Array, live_RW: Array | None = None
) -> Cache:
    """The completions' cache (keys [R, K, W, H, S], values [R, K, W, S, H]) with one token added.

    Every lane writes the same column, whatever the position of its token. That is one slice; a
    column for each lane would be a scatter. With `live_RW` the other lanes keep what they have
    there, which takes a decode step 2 % more time on CPU.
    """
    k, v = cache
    k_new = jnp.swapaxes(k_RWKH, 1, 2)[..., None]
    v_new = jnp.swapaxes(v_RWKH, 1, 2)[..., None, :]

    at = {"allow_negative_indices": False}  # no column is negative

    def put(old: Array, new: Array, column: Array, axis: int) -> Array:
        if live_RW is not None:
            there = lax.dynamic_slice_in_dim(old, column, 1, axis, **at)
            live = live_RW[:, None].reshape(live_RW.shape[0], 1, -1, *(1,) * (old.ndim - 3))
            new = where(live, new.astype(old.dtype), there)
        return lax.dynamic_update_slice_in_dim(old, new, column, axis, **at)

    if isinstance(k, Int8):
        k_new, v_new = quantize.int8(k_new, 3), quantize.int8(v_new, 4)
        return (
            Int8(put(k.codes, k_new.codes, column, 4), put(k.scale, k_new.scale, column, 3)),
            Int8(put(v.codes, v_new.codes, column, 3), put(v.scale, v_new.scale, column, 3)),
        )
    return put(k, k_new, column, 4), put(v, v_new, column, 3)


def decode(q_RWNH: Array, prefix: Cache, own: Cache, step: DecodeStep) -> Array:
    """One new token per lane attends to its slot's prompt and to its own past, [R, W, N, H].

    Its key is already in column `step.column` of `own`, and earlier keys in the columns before it,
    wrapping around the ring's end.
    """
    column, window = step.column, step.window
    prefix_k, own_k = prefix[0], own[0]
    q_RKWnH = jnp.swapaxes(attention.grouped(q_RWNH, prefix_k.shape[1]), 1, 2)
    s_11Q = jnp.arange(prefix_k.shape[-1])[None, None]
    size = own_k.shape[-1]
    age_11S = split_index(column + size - jnp.arange(size), size)[1][None, None]
    seen_prefix = s_11Q < step.prompt_length_R[:, None, None]  # [R, 1, Q]
    seen_own = age_11S <= step.time_RW[..., None]  # [R, W, S]
    if window is not None:
        position_RW = step.prompt_length_R[:, None] + step.time_RW
        seen_prefix = seen_prefix & (position_RW[..., None] - s_11Q < window)
        seen_own &= age_11S < window
    seen = seen_prefix[:, None, :, None], seen_own[:, None, :, None]
    out = _attended(q_RKWnH, prefix, own, *seen, step.cap)
    out = jnp.swapaxes(out, 1, 2)
    return out.astype(q_RWNH.dtype).reshape(q_RWNH.shape)


def decode_chunk(q_RWMNH: Array, prefix: Cache, own: Cache, chunk: Chunk) -> Array:
    """A chunk's tokens attend to the prompt and to their lane's past, [R, W, M, N, H].

    Their keys are already in `own`, whose last column may be past the ring's limit.
    """
    slots, lanes, tokens, _, size = q_RWMNH.shape
    prefix_k, own_k = prefix[0], own[0]
    q_RWMKnH = attention.grouped(q_RWMNH, prefix_k.shape[1])
    heads, queries = q_RWMKnH.shape[3:5]
    q_RKWMnH = jnp.moveaxis(q_RWMKnH, 3, 1)
    age_11M1 = chunk.ages(tokens)[None, None, :, None]
    s_111Q, s_111S = (jnp.arange(x.shape[-1])[None, None, None] for x in (prefix_k, own_k))
    age_111S = (chunk.column - 1 - s_111S) % chunk.limit
    seen_prefix = s_111Q < chunk.prompt_length_R[:, None, None, None]
    seen_own = (age_111S >= age_11M1) & (s_111S < chunk.limit)
    seen_own = seen_own & (age_111S < chunk.length_RW[..., None, None])  # [R, W, M, S]
    if chunk.window is not None:
        position_RWM1 = chunk.positions(tokens)[..., None]
        seen_prefix = seen_prefix & (position_RWM1 - s_111Q < chunk.window)
        seen_own &= age_111S - age_11M1 < chunk.window

    def of_queries(seen: Array) -> Array:
        """[R, 1, W, M * n, keys], from [R, W or 1, M or 1, keys]."""
        of_tokens = jnp.broadcast_to(seen, (slots, lanes, tokens, seen.shape[-1]))
        return jnp.repeat(of_tokens, queries, axis=2)[:, None]

    q_RKWmH = q_RKWMnH.reshape(slots, heads, lanes, tokens * queries, size)
    masks = of_queries(seen_prefix), of_queries(seen_own)
    out = _attended(q_RKWmH, prefix, own, *masks, chunk.cap)
    out = jnp.moveaxis(out.reshape(q_RKWMnH.shape), 1, 3)
    return out.astype(q_RWMNH.dtype).reshape(q_RWMNH.shape)


def _attended(
    q_RKWnH: Array,
    prefix: Cache,
    own: Cache,
    seen_prefix: Array,
    seen_own: Array,
    cap: float | None,
) -> Array:
    """Attention of lanes' queries to prompts and to own tokens, float32 [R, K, W, n, H].

    The masks are [R, 1, W or 1, n or 1, keys].
    """
    (prefix_k, prefix_v), (own_k, own_v) = prefix, own
    dtype = q_RKWnH.dtype

    def product(spec: str, x: Array, kept: Array | Int8) -> Array:
        codes = kept.codes if isinstance(kept, Int8) else kept
        return jnp.einsum(spec, x, codes.astype(dtype), preferred_element_type=jnp.float32)

    # Heads come before lanes in all arrays: in any other order XLA transposes the cache.
    score_prefix = product("rkwnh,rkhq->rkwnq", q_RKWnH, prefix_k)
    score_own = product("rkwnh,rkwhs->rkwns", q_RKWnH, own_k)
    if isinstance(own_k, Int8):
        score_prefix *= prefix_k.scale[:, :, None, None]  # [R, K, 1, 1, Q]
        score_own *= own_k.scale[:, :, :, None]  # [R, K, W, 1, S]
    score_prefix, score_own = (attention.capped(s, cap) for s in (score_prefix, score_own))
    score_prefix = where(seen_prefix, score_prefix, attention.HIDDEN)
    score_own = where(seen_own, score_own, attention.HIDDEN)
    weight_prefix, weight_own, total = attention.merged_weights(score_prefix, score_own)
    if isinstance(own_v, Int8):
        weight_prefix *= prefix_v.scale[:, :, None, None]
        weight_own *= own_v.scale[:, :, :, None]
    out = product("rkwnq,rkqh->rkwnh", weight_prefix.astype(dtype), prefix_v)
    out += product("rkwns,rkwsh->rkwnh", weight_own.astype(dtype), own_v)
    return out / total[..., None]


@dataclasses.dataclass(frozen=True)
class RingCache(KVCache):
    """The cache in plain XLA.

    A pair: the prompts', keys [R, K, H, Q] and values [R, K, Q, H], and the completions', keys [R,
    K, W, H, S] and values [R, K, W, S, H], S = C columns, written as a ring.
    """

    int8: bool = False
    _KEY_AXIS: ClassVar[int] = -1  # of keys' positions; those of values are at -2

    def empty(self, shape: CacheShape, dtype: Any) -> tuple[Cache, Cache]:
        make = functools.partial(empty_cache, size=shape.head_size, dtype=dtype, int8=self.int8)
        slots = shape.slots, shape.num_kv_heads
        return make(slots, shape.prompt_tokens), make((*slots, shape.lanes), shape.limit)

    def of_prompt(self, k_RQKH: Array, v_RQKH: Array) -> Cache:
        return prefix_cache(k_RQKH, v_RQKH, int8=self.int8)

    def admit(
        self, cache: tuple[Cache, Cache], prompt: Cache, slot_A: Array, length_A: Array, lanes: int
    ) -> tuple[Cache, Cache]:
        how = {"mode": "drop", "wrap_negative_indices": False}
        put = lambda old, new: old.at[slot_A].set(new, **how)  # noqa: E731
        return jax.tree.map(put, cache[0], prompt), cache[1]

    def extend(
        self,
        cache: tuple[Cache, Cache],
        q_RWNH: Array,
        k_RWKH: Array,
        v_RWKH: Array,
        step: DecodeStep,
    ) -> tuple[Array, tuple[Cache, Cache]]:
        q_RWNH, k_RWKH = (rotary.rotate(x, step.cos_sin) for x in (q_RWNH, k_RWKH))
        live_RW = step.live_RW if step.keeps else None
        prefix, own = cache[0], write(cache[1], k_RWKH, v_RWKH, step.column, live_RW)
        return decode(q_RWNH, prefix, own, step), (prefix, own)

    def align(self, cache: tuple[Cache, Cache], shift_RW: Array, limit: int) -> tuple[Cache, Cache]:
        def rolled(x: Array, axis: int) -> Array:
            s_11S = jnp.arange(x.shape[axis])[None, None]
            moved_RWS = (s_11S - shift_RW[..., None]) % limit
            from_RWS = where(s_11S < limit, moved_RWS, s_11S)
            of_lane = lambda x, at_S: jnp.take(x, at_S, axis=axis)  # noqa: E731
            return jax.vmap(jax.vmap(of_lane, (1, 0), 1))(x, from_RWS)

        return cache[0], self._by_position(cache[1], rolled)

    def append(
        self,
        cache: tuple[Cache, Cache],
        q_RWMNH: Array,
        k_RWMKH: Array,
        v_RWMKH: Array,
        chunk: Chunk,
    ) -> tuple[Array, tuple[Cache, Cache]]:
        q_RWMNH, k_RWMKH = (rotary.rotate(x, chunk.cos_sin) for x in (q_RWMNH, k_RWMKH))
        tokens = k_RWMKH.shape[2]
        column_M = (chunk.column - 1 - chunk.ages(tokens)) % chunk.limit
        there_R1WM = chunk.is_there(tokens)[:, None]
        prefix, own = cache
        # [R, K, W, M, H], then in the layout of the cache.
        new = [jnp.moveaxis(x, 3, 1) for x in (k_RWMKH, v_RWMKH)]
        new = tuple(quantize.int8(x, 4) for x in new) if self.int8 else tuple(new)
        new = self._keys_as(self._KEY_AXIS, new)

        def put(old: Array, axis: int, new: Array) -> Array:
            at = (slice(None),) * (old.ndim + axis) + (column_M,)
            mask = there_R1WM.reshape(*there_R1WM.shape[:3], *(1,) * (old.ndim + axis - 3), tokens,
                                      *(1,) * (-1 - axis))  # fmt: skip
            new = where(mask, new.astype(old.dtype), old[at])
            return old.at[at].set(new, unique_indices=True)

        own = self._by_position(own, put, new)
        read = (self._keys_as(-1, x, self._KEY_AXIS) for x in (prefix, own))
        return decode_chunk(q_RWMNH, *read, chunk), (prefix, own)

    def _by_position(self, cache: Cache, f: Callable, *others: Cache) -> Cache:
        """Applies `f(array, axis of its positions, *others)` to keys, values and their scales."""
        out = []
        for axis, *kept in zip((self._KEY_AXIS, -2), cache, *others):
            if isinstance(kept[0], Int8):
                codes, *of_codes = (x.codes for x in kept)
                scale, *of_scale = (x.scale for x in kept)
                out.append(Int8(f(codes, axis, *of_codes), f(scale, -1, *of_scale)))
            else:
                out.append(f(kept[0], axis, *kept[1:]))
        return tuple(out)

    @staticmethod
    def _keys_as(axis: int, cache: Cache, now: int = -2) -> Cache:
        """The cache with its keys' positions at another axis."""
        keys, values = cache
        if axis == now:
            return cache
        if isinstance(keys, Int8):
            return Int8(jnp.swapaxes(keys.codes, -1, -2), keys.scale), values
        return jnp.swapaxes(keys, -1, -2), values

    def compact(
        self, cache: tuple[Cache, Cache], slot_R: Array, lane_RW: Array, lanes: int, limit: int
    ) -> tuple[Cache, Cache]:
        swapped = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        lanes_of = lambda x: swapped(swapped(x)[slot_R[:, None], lane_RW])  # noqa: E731
        prefix, own = cache
        return jax.tree.map(lambda x: x[slot_R], prefix), jax.tree.map(lanes_of, own)

    def put_back(
        self,
        cache: tuple[Cache, Cache],
        smaller: tuple[Cache, Cache],
        slot_RW: Array,
        lane_RW: Array,
        limit: int,
    ) -> tuple[Cache, Cache]:
        def put(old: Array, new: Array) -> Array:
            return old.at[slot_RW, :, lane_RW].set(jnp.swapaxes(new, 1, 2), mode="drop")

        return cache[0], jax.tree.map(put, cache[1], smaller[1])


RING = RingCache()
