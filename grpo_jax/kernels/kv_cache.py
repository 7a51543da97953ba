"""The KV cache, and how a new token attends to it, in plain XLA.

Besides the axes of `structs.py`, A are prompts that are admitted to slots.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.kernels import attention, quantize, rotary
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

        Queries and keys come unrotated; `step.cos_sin` has their angles.
        """

    @abc.abstractmethod
    def compact(self, cache: Any, slot_R: Array, lane_RW: Array, lanes: int, limit: int) -> Any:
        """A smaller cache: slot r has old slot `slot_R[r]`'s prompt, and its lanes `lane_RW[r]`."""


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


def write(cache: Cache, k_RWKH: Array, v_RWKH: Array, column: Array) -> Cache:
    """The completions' cache (keys [R, K, W, H, S], values [R, K, W, S, H]) with one token added.

    Every lane writes the same column, whatever the position of its token. That is one slice; a
    column for each lane would be a scatter.
    """
    k, v = cache
    k_new = jnp.swapaxes(k_RWKH, 1, 2)[..., None]
    v_new = jnp.swapaxes(v_RWKH, 1, 2)[..., None, :]
    put = jax.lax.dynamic_update_slice_in_dim
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
    (prefix_k, prefix_v), (own_k, own_v) = prefix, own
    q_RKWnH = jnp.swapaxes(attention.grouped(q_RWNH, prefix_k.shape[1]), 1, 2)
    dtype = q_RWNH.dtype

    def product(spec: str, x: Array, kept: Array | Int8) -> Array:
        codes = kept.codes if isinstance(kept, Int8) else kept
        return jnp.einsum(spec, x, codes.astype(dtype), preferred_element_type=jnp.float32)

    # Heads come before lanes in all arrays: in any other order XLA transposes the cache.
    score_prefix = product("rkwnh,rkhq->rkwnq", q_RKWnH, prefix_k)
    score_own = product("rkwnh,rkwhs->rkwns", q_RKWnH, own_k)
    if isinstance(own_k, Int8):
        score_prefix *= prefix_k.scale[:, :, None, None]  # [R, K, 1, 1, Q]
        score_own *= own_k.scale[:, :, :, None]  # [R, K, W, 1, S]
    score_prefix, score_own = (attention.capped(s, step.cap) for s in (score_prefix, score_own))
    s_11Q = jnp.arange(prefix_k.shape[-1])[None, None]
    age_11S = ((column - jnp.arange(own_k.shape[-1])) % own_k.shape[-1])[None, None]
    seen_prefix = s_11Q < step.prompt_length_R[:, None, None]  # [R, 1, Q]
    seen_own = age_11S <= step.time_RW[..., None]  # [R, W, S]
    if window is not None:
        position_RW = step.prompt_length_R[:, None] + step.time_RW
        seen_prefix = seen_prefix & (position_RW[..., None] - s_11Q < window)
        seen_own &= age_11S < window
    score_prefix = jnp.where(seen_prefix[:, None, :, None], score_prefix, attention.HIDDEN)
    score_own = jnp.where(seen_own[:, None, :, None], score_own, attention.HIDDEN)
    weight_prefix, weight_own, total = attention.merged_weights(score_prefix, score_own)
    if isinstance(own_v, Int8):
        weight_prefix *= prefix_v.scale[:, :, None, None]
        weight_own *= own_v.scale[:, :, :, None]
    out = product("rkwnq,rkqh->rkwnh", weight_prefix.astype(dtype), prefix_v)
    out += product("rkwns,rkwsh->rkwnh", weight_own.astype(dtype), own_v)
    out = jnp.swapaxes(out / total[..., None], 1, 2)
    return out.astype(q_RWNH.dtype).reshape(q_RWNH.shape)


@dataclasses.dataclass(frozen=True)
class RingCache(KVCache):
    """The cache in plain XLA.

    A pair: the prompts', keys [R, K, H, Q] and values [R, K, Q, H], and the completions', keys [R,
    K, W, H, S] and values [R, K, W, S, H], S = C columns, written as a ring.
    """

    int8: bool = False

    def empty(self, shape: CacheShape, dtype: Any) -> tuple[Cache, Cache]:
        make = functools.partial(empty_cache, size=shape.head_size, dtype=dtype, int8=self.int8)
        slots = shape.slots, shape.num_kv_heads
        return make(slots, shape.prompt_tokens), make((*slots, shape.lanes), shape.limit)

    def of_prompt(self, k_RQKH: Array, v_RQKH: Array) -> Cache:
        return prefix_cache(k_RQKH, v_RQKH, int8=self.int8)

    def admit(
        self, cache: tuple[Cache, Cache], prompt: Cache, slot_A: Array, length_A: Array, lanes: int
    ) -> tuple[Cache, Cache]:
        put = lambda old, new: old.at[slot_A].set(new, mode="drop")  # noqa: E731
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
        prefix, own = cache[0], write(cache[1], k_RWKH, v_RWKH, step.column)
        return decode(q_RWNH, prefix, own, step), (prefix, own)

    def compact(
        self, cache: tuple[Cache, Cache], slot_R: Array, lane_RW: Array, lanes: int, limit: int
    ) -> tuple[Cache, Cache]:
        swapped = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        lanes_of = lambda x: swapped(swapped(x)[slot_R[:, None], lane_RW])  # noqa: E731
        prefix, own = cache
        return jax.tree.map(lambda x: x[slot_R], prefix), jax.tree.map(lanes_of, own)


RING = RingCache()
