"""Grouped-query attention of scoring and training, in plain XLA.

One softmax covers two sets of keys, the prompt's and the completion's own: a prompt is computed
once for its whole group, and every completion of the group attends to it and to itself. A common
maximum and denominator merge the two parts, so nothing is copied or concatenated. Softmax is
float32 whatever the dtype of queries and keys. Decoding (`kv_cache.py`) merges its two parts in the
same way.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from grpo_jax.kernels.primitives import where
from grpo_jax.structs import Array


class Seen(NamedTuple):
    """The keys of its row that each token sees, as indices in the row, int32 [B, T].

    A token sees the keys from `begin_BT` up to its own, and those of its group's prompt, from
    `prompt_begin_BT` up to and without `prompt_end_BT`; a token of a prompt has no such. Both are
    None if the rows have no prompts. The two parts have no key in common.
    """

    begin_BT: Array
    prompt_begin_BT: Array | None = None
    prompt_end_BT: Array | None = None


class AttentionKernels(Protocol):
    """The functions of attention in scoring and training.

    This module, a `FusedAttention`, or `row_blocks.RowBlocks`.
    """

    @property
    def shares_lanes(self) -> bool:
        """Whether a lane may hold several completions."""

    def needs_lanes(self, width: int) -> bool:
        """Whether completions of up to `width` entries are to be laid out in lanes.

        Else `by_row` computes the attention of a row.
        """

    def by_row(
        self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, seen: Seen, cap: float | None = None
    ) -> Array:
        """As `by_row`. Only called if rows have no lanes."""

    def causal(
        self,
        q_BTNH: Array,
        k_BTKH: Array,
        v_BTKH: Array,
        segment_BT: Array,
        window: int | None,
        cap: float | None = None,
    ) -> Array:
        """As `causal`."""

    def shared_prefix(
        self,
        q_PWTNH: Array,
        k_PWTKH: Array,
        v_PWTKH: Array,
        segment_PWT: Array,
        prefix_k_PQKH: Array,
        prefix_v_PQKH: Array,
        prefix_length_P: Array,
        position_PWT: Array,
        window: int | None,
        cap: float | None = None,
    ) -> Array:
        """As `shared_prefix`."""


shares_lanes = True


def needs_lanes(width: int) -> bool:
    """Always: `by_row` computes every pair of a row."""
    return True


# Far below any score, and finite: a row that sees no key gives the mean of the values, not NaN.
# Nothing reads such a row.
HIDDEN = -1e30


def grouped(q: Array, num_kv_heads: int) -> Array:
    """Queries [..., N, H] grouped by their key-value head, [..., K, N/K, H], divided by sqrt(H)."""
    *lead, num_heads, size = q.shape
    q = q * jnp.asarray(size**-0.5, q.dtype)
    return q.reshape(*lead, num_kv_heads, num_heads // num_kv_heads, size)


def capped(score: Array, cap: float | None) -> Array:
    """Scores within plus and minus `cap`, by a hyperbolic tangent; as they are for None."""
    return score if cap is None else cap * jnp.tanh(score / cap)


def segments(length_B: Array, tokens: int) -> Array:
    """1 for the tokens of a row, 0 for the padding on its right, int32 [B, T]."""
    return (jnp.arange(tokens)[None] < length_B[:, None]).astype(jnp.int32)


def causal(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_BT: Array,
    window: int | None,
    cap: float | None = None,
) -> Array:
    """Each token attends to itself and to earlier tokens of its segment, [B, T, N, H].

    Segments stand one after the other in a row; 0 is padding. `window`: the number of keys that a
    query sees, itself included; None for all. `cap`: of the scores, see `capped`.
    """
    q_BTKnH = grouped(q_BTNH, k_BTKH.shape[-2])
    score = jnp.einsum("btknh,bskh->bknts", q_BTKnH, k_BTKH, preferred_element_type=jnp.float32)
    score = capped(score, cap)
    t = jnp.arange(score.shape[-1])
    seen_TT = t[None, :] <= t[:, None]
    if window is not None:
        seen_TT &= t[:, None] - t[None, :] < window
    seen_BTT = seen_TT[None] & (segment_BT[:, :, None] == segment_BT[:, None, :])
    seen = seen_BTT[:, None, None]
    weight = jax.nn.softmax(where(seen, score, HIDDEN), axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bknts,bskh->btknh", weight, v_BTKH).reshape(q_BTNH.shape)


def merged_weights(prefix: Array, own: Array) -> tuple[Array, Array, Array]:
    """Unnormalised softmax weights of two score blocks, and their joint denominator."""
    peak = jnp.maximum(prefix.max(-1, keepdims=True), own.max(-1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    prefix, own = jnp.exp(prefix - peak), jnp.exp(own - peak)
    return prefix, own, prefix.sum(-1) + own.sum(-1)


def shared_prefix(
    q_PWTNH: Array,
    k_PWTKH: Array,
    v_PWTKH: Array,
    segment_PWT: Array,
    prefix_k_PQKH: Array,
    prefix_v_PQKH: Array,
    prefix_length_P: Array,
    position_PWT: Array,
    window: int | None,
    cap: float | None = None,
) -> Array:
    """Every completion attends to its group's prompt and, causally, to itself, [P, W, T, N, H].

    A lane holds completions one after the other: tokens of equal `segment_PWT` are one completion,
    `position_PWT` counts from its first token. One product multiplies the queries of a whole group
    with the prompt's keys.
    """
    q = grouped(q_PWTNH, k_PWTKH.shape[-2])
    prefix = jnp.einsum("pgtknh,pqkh->pkgntq", q, prefix_k_PQKH, preferred_element_type=jnp.float32)
    own = jnp.einsum("pgtknh,pgskh->pkgnts", q, k_PWTKH, preferred_element_type=jnp.float32)
    prefix, own = capped(prefix, cap), capped(own, cap)
    t, s_1Q = jnp.arange(own.shape[-1]), jnp.arange(prefix.shape[-1])[None]
    seen_own = t[None, :] <= t[:, None]
    if window is not None:
        seen_own &= t[:, None] - t[None, :] < window
    seen_own = seen_own[None, None] & (segment_PWT[..., :, None] == segment_PWT[..., None, :])
    seen_prefix = (s_1Q < prefix_length_P[:, None])[:, None, None, :]  # [P, 1, 1, Q]
    if window is not None:
        past_PWT1 = (prefix_length_P[:, None, None] + position_PWT)[..., None]
        seen_prefix = seen_prefix & (past_PWT1 - s_1Q[None, None] < window)
    prefix = where(seen_prefix[:, None, :, None], prefix, HIDDEN)
    own = where(seen_own[:, None, :, None], own, HIDDEN)
    prefix, own, total = merged_weights(prefix, own)
    dtype = v_PWTKH.dtype
    out = jnp.einsum(
        "pkgntq,pqkh->pgtknh",
        prefix.astype(dtype),
        prefix_v_PQKH,
        preferred_element_type=jnp.float32,
    ) + jnp.einsum(
        "pkgnts,pgskh->pgtknh", own.astype(dtype), v_PWTKH, preferred_element_type=jnp.float32
    )
    out = out / jnp.transpose(total, (0, 2, 4, 1, 3))[..., None]
    return out.astype(q_PWTNH.dtype).reshape(q_PWTNH.shape)


def by_row(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, seen: Seen, cap: float | None = None
) -> Array:
    """Each token attends to what it sees of its row, [B, T, N, H]; every pair is computed."""
    q_BTKnH = grouped(q_BTNH, k_BTKH.shape[-2])
    score = jnp.einsum("btknh,bskh->bknts", q_BTKnH, k_BTKH, preferred_element_type=jnp.float32)
    t = jnp.arange(score.shape[-1])
    s_11S, t_1T1 = t[None, None], t[None, :, None]
    seen_BTS = (s_11S >= seen.begin_BT[..., None]) & (s_11S <= t_1T1)
    if seen.prompt_begin_BT is not None:
        in_prompt = s_11S >= seen.prompt_begin_BT[..., None]
        seen_BTS |= in_prompt & (s_11S < seen.prompt_end_BT[..., None])
    score = where(seen_BTS[:, None, None], capped(score, cap), HIDDEN)
    weight = jax.nn.softmax(score, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bknts,bskh->btknh", weight, v_BTKH).reshape(q_BTNH.shape)
