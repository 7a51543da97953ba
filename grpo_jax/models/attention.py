"""Grouped-query attention in the three forms that training and sampling need, in plain XLA.

All three share one softmax over two sets of keys, the prompt's and the completion's own: a prompt
is computed once for its whole group, and every completion of the group attends to it and to
itself. The two parts are merged by their common maximum and denominator, so nothing is copied or
concatenated. Softmax is float32 whatever the dtype of queries and keys.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from grpo_jax.models import quantize
from grpo_jax.models.quantize import Int8
from grpo_jax.structs import Array

shares_lanes = True  # a lane may hold several completions

# Far below any score and finite: a row with no key to see gives the mean of the values, not NaN.
# Nothing reads such a row.
_HIDDEN = -1e30


def rotary(position: Array, inv_freq: Array) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, float32 [..., H/2], for positions [...]."""
    angle = jnp.multiply.outer(position.astype(jnp.float32), inv_freq)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Heads [..., heads, H] turned by their rotary angles (Su et al. 2021, arXiv:2104.09864).

    Pairs are (i, i + H/2), the layout of the Hugging Face checkpoints.
    """
    cos, sin = (t[..., None, :] for t in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def grouped(q: Array, num_kv_heads: int) -> Array:
    """Queries [..., N, H] by the key-value head they read, [..., K, N/K, H], over sqrt(H)."""
    *lead, num_heads, size = q.shape
    q = q * jnp.asarray(size**-0.5, q.dtype)
    return q.reshape(*lead, num_kv_heads, num_heads // num_kv_heads, size)


def causal(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, length_B: Array, window) -> Array:
    """Each token attends to itself and what came before it in its row, [B, T, N, H].

    Rows are padded on the right; keys past `length_B` are never seen. `window`: how many keys a
    query looks back over, itself included; None for all.
    """
    q_BTKnH = grouped(q_BTNH, k_BTKH.shape[-2])
    score = jnp.einsum("btknh,bskh->bknts", q_BTKnH, k_BTKH, preferred_element_type=jnp.float32)
    t = jnp.arange(score.shape[-1])
    seen_TT = t[None, :] <= t[:, None]
    if window is not None:
        seen_TT &= t[:, None] - t[None, :] < window
    seen_BT = t[None, :] < length_B[:, None]
    seen = seen_TT[None, None, None] & seen_BT[:, None, None, None, :]
    weight = jax.nn.softmax(jnp.where(seen, score, _HIDDEN), axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bknts,bskh->btknh", weight, v_BTKH).reshape(q_BTNH.shape)


def _merged_weights(prefix: Array, own: Array) -> tuple[Array, Array, Array]:
    """Unnormalised softmax weights of two score blocks, and their joint denominator."""
    peak = jnp.maximum(prefix.max(-1, keepdims=True), own.max(-1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    prefix, own = jnp.exp(prefix - peak), jnp.exp(own - peak)
    return prefix, own, prefix.sum(-1) + own.sum(-1)


def shared_prefix(
    q_PLTNH: Array,
    k_PLTKH: Array,
    v_PLTKH: Array,
    segment_PLT: Array,
    prefix_k_PQKH: Array,
    prefix_v_PQKH: Array,
    prefix_length_P: Array,
    position_PLT: Array,
    window,
) -> Array:
    """Every completion attends to its group's prompt and, causally, to itself, [P, L, T, N, H].

    A lane holds completions one after the other: tokens of equal `segment_PLT` are one completion,
    `position_PLT` counts from its first token. The queries of a whole group meet the prompt's keys
    in one product.
    """
    q = grouped(q_PLTNH, k_PLTKH.shape[-2])
    prefix = jnp.einsum("pgtknh,pqkh->pkgntq", q, prefix_k_PQKH, preferred_element_type=jnp.float32)
    own = jnp.einsum("pgtknh,pgskh->pkgnts", q, k_PLTKH, preferred_element_type=jnp.float32)
    t, s_1Q = jnp.arange(own.shape[-1]), jnp.arange(prefix.shape[-1])[None]
    seen_own = t[None, :] <= t[:, None]
    if window is not None:
        seen_own &= t[:, None] - t[None, :] < window
    seen_own = seen_own[None, None] & (segment_PLT[..., :, None] == segment_PLT[..., None, :])
    seen_prefix = (s_1Q < prefix_length_P[:, None])[:, None, None, :]  # [P, 1, 1, Q]
    if window is not None:
        past_PLT1 = (prefix_length_P[:, None, None] + position_PLT)[..., None]
        seen_prefix = seen_prefix & (past_PLT1 - s_1Q[None, None] < window)
    prefix = jnp.where(seen_prefix[:, None, :, None], prefix, _HIDDEN)
    own = jnp.where(seen_own[:, None, :, None], own, _HIDDEN)
    prefix, own, total = _merged_weights(prefix, own)
    dtype = v_PLTKH.dtype
    out = jnp.einsum(
        "pkgntq,pqkh->pgtknh",
        prefix.astype(dtype),
        prefix_v_PQKH,
        preferred_element_type=jnp.float32,
    ) + jnp.einsum(
        "pkgnts,pgskh->pgtknh", own.astype(dtype), v_PLTKH, preferred_element_type=jnp.float32
    )
    out = out / jnp.transpose(total, (0, 2, 4, 1, 3))[..., None]
    return out.astype(q_PLTNH.dtype).reshape(q_PLTNH.shape)


# Decoding. Keys are stored transposed, [..., K, H, positions]: 1.4 times the speed of positions
# first on CPU, where one query meets many keys.


Cache = tuple[
    Array | Int8, Array | Int8
]  # keys and values; in 8 bits a scale per head and position


def prefix_cache(k_RQKH: Array, v_RQKH: Array, *, int8: bool = False) -> Cache:
    """A prompt's keys [R, K, H, Q] and values [R, K, Q, H] as decoding reads them."""
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

    Every lane writes the same column, whatever the position of its token: one slice, where a column
    for each lane is a scatter.
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


def decode(
    q_RWNH: Array,
    prefix: Cache,
    own: Cache,
    prefix_length_R: Array,
    time_RW: Array,
    column: Array,
    window: int | None,
) -> Array:
    """One new token per lane attends to its slot's prompt and to its own past, [R, W, N, H].

    `time_RW` is the new token's position in its completion; its key stands in `column` of `own`
    already, and those before it in the columns before, round the end.
    """
    (prefix_k, prefix_v), (own_k, own_v) = prefix, own
    q_RKWnH = jnp.swapaxes(grouped(q_RWNH, prefix_k.shape[1]), 1, 2)
    dtype = q_RWNH.dtype

    def product(spec: str, x: Array, kept: Array | Int8) -> Array:
        codes = kept.codes if isinstance(kept, Int8) else kept
        return jnp.einsum(spec, x, codes.astype(dtype), preferred_element_type=jnp.float32)

    # The heads stand before the lanes in all of them: in any other order XLA turns the cache round.
    score_prefix = product("rkwnh,rkhq->rkwnq", q_RKWnH, prefix_k)
    score_own = product("rkwnh,rkwhs->rkwns", q_RKWnH, own_k)
    if isinstance(own_k, Int8):
        score_prefix *= prefix_k.scale[:, :, None, None]  # [R, K, 1, 1, Q]
        score_own *= own_k.scale[:, :, :, None]  # [R, K, W, 1, S]
    s_11Q = jnp.arange(prefix_k.shape[-1])[None, None]
    age_11S = ((column - jnp.arange(own_k.shape[-1])) % own_k.shape[-1])[None, None]
    seen_prefix = s_11Q < prefix_length_R[:, None, None]  # [R, 1, Q]
    seen_own = age_11S <= time_RW[..., None]  # [R, W, S]
    if window is not None:
        position_RW = prefix_length_R[:, None] + time_RW
        seen_prefix = seen_prefix & (position_RW[..., None] - s_11Q < window)
        seen_own &= age_11S < window
    score_prefix = jnp.where(seen_prefix[:, None, :, None], score_prefix, _HIDDEN)
    score_own = jnp.where(seen_own[:, None, :, None], score_own, _HIDDEN)
    weight_prefix, weight_own, total = _merged_weights(score_prefix, score_own)
    if isinstance(own_v, Int8):
        weight_prefix *= prefix_v.scale[:, :, None, None]
        weight_own *= own_v.scale[:, :, :, None]
    out = product("rkwnq,rkqh->rkwnh", weight_prefix.astype(dtype), prefix_v)
    out += product("rkwns,rkwsh->rkwnh", weight_own.astype(dtype), own_v)
    out = jnp.swapaxes(out / total[..., None], 1, 2)
    return out.astype(q_RWNH.dtype).reshape(q_RWNH.shape)


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a layer's cache of slots and lanes is kept, written and read, in plain XLA.

    A pair: the prompts', keys [R, K, H, Q] and values [R, K, Q, H], and the completions', keys
    [R, K, W, H, S] and values [R, K, W, S, H], S = C columns that are written round and round.
    """

    int8: bool = False

    def empty(
        self, slots: int, lanes: int, prompt_tokens: int, limit: int, heads: int, size: int, dtype
    ) -> tuple[Cache, Cache]:
        make = functools.partial(empty_cache, size=size, dtype=dtype, int8=self.int8)
        return make((slots, heads), prompt_tokens), make((slots, heads, lanes), limit)

    def of_prompt(self, k_RQKH: Array, v_RQKH: Array) -> Cache:
        """A prompt's part of the cache."""
        return prefix_cache(k_RQKH, v_RQKH, int8=self.int8)

    def admit(
        self, cache: tuple[Cache, Cache], prompt: Cache, slot_A: Array, length_A: Array, lanes: int
    ) -> tuple[Cache, Cache]:
        """The cache with prompts in their slots; a slot past the last is dropped."""
        put = lambda old, new: old.at[slot_A].set(new, mode="drop")  # noqa: E731
        return jax.tree.map(put, cache[0], prompt), cache[1]

    def extend(
        self,
        cache: tuple[Cache, Cache],
        q_RWNH: Array,
        k_RWKH: Array,
        v_RWKH: Array,
        cos_sin: tuple[Array, Array],
        prompt_length_R: Array,
        time_RW: Array,
        live_RW: Array,
        column: Array,
        limit: int,
        window: int | None,
    ) -> tuple[Array, tuple[Cache, Cache]]:
        """One new token per lane: what it attends to [R, W, N, H], and the cache with it.

        Queries and keys are still to be rotated by their angles, `cos_sin` [R, W, H/2].
        """
        q_RWNH, k_RWKH = (rotate(x, cos_sin) for x in (q_RWNH, k_RWKH))
        prefix, own = cache[0], write(cache[1], k_RWKH, v_RWKH, column)
        out = decode(q_RWNH, prefix, own, prompt_length_R, time_RW, column, window)
        return out, (prefix, own)

    def compact(
        self, cache: tuple[Cache, Cache], slot_R: Array, lane_RW: Array, lanes: int, limit: int
    ) -> tuple[Cache, Cache]:
        """New slot r has old slot `slot_R[r]`'s prompt, and its lanes `lane_RW[r]`."""
        swapped = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        lanes_of = lambda x: swapped(swapped(x)[slot_R[:, None], lane_RW])  # noqa: E731
        prefix, own = cache
        return jax.tree.map(lambda x: x[slot_R], prefix), jax.tree.map(lanes_of, own)


RING = Ring()
