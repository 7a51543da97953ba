"""Attention through any mask in plain XLA, as one of the kernels of `fused_attention.py`.

A completion's window reaches into its prompt by what its own tokens leave of the window, which is
known only when the program runs. The masks of the other kernels are fixed when it is compiled.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from grpo_jax.kernels.attention import HIDDEN
from grpo_jax.kernels.primitives import where
from grpo_jax.structs import Array


@dataclasses.dataclass(frozen=True)
class MaskedAttention:
    """As `FusedAttention.kernel`, with the mask `seen_BTS` in place of the segments."""

    seen_BTS: Array  # True where a query sees a key

    def with_lse(self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array):
        score = self._scores(q, k)
        lse_BKnT = jnp.maximum(_log_sum_exp(score), HIDDEN)  # finite also for a query without keys
        weight = jnp.exp(score - lse_BKnT[..., None]).astype(v.dtype)
        out = jnp.einsum("bknts,bskh->btknh", weight, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype).reshape(q.shape), _by_query(lse_BKnT)

    def gradients(
        self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array, out, lse, by_out
    ) -> tuple[Array, Array, Array]:
        """FlashAttention-2 (arXiv:2307.08691, algorithm 2), in one block."""
        heads = k.shape[2]
        grouped = lambda x: x.reshape(*x.shape[:2], heads, -1, *x.shape[3:])  # noqa: E731
        q_BTKnH, by_out_BTKnH = grouped(q), grouped(by_out)
        lse_BKnT = jnp.moveaxis(grouped(lse), 1, 3)
        weight = jnp.exp(self._scores(q, k) - lse_BKnT[..., None])
        by_weight = jnp.einsum(
            "btknh,bskh->bknts", by_out_BTKnH, v, preferred_element_type=jnp.float32
        )
        mean_BTN = (by_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
        mean_BKnT = jnp.moveaxis(grouped(mean_BTN), 1, 3)
        by_score = (weight * (by_weight - mean_BKnT[..., None])).astype(q.dtype)
        by_q = jnp.einsum("bknts,bskh->btknh", by_score, k).reshape(q.shape)
        by_k = jnp.einsum("bknts,btknh->bskh", by_score, q_BTKnH)
        by_v = jnp.einsum("bknts,btknh->bskh", weight.astype(v.dtype), by_out_BTKnH)
        return by_q, by_k, by_v

    def _scores(self, q: Array, k: Array) -> Array:
        """Float32 [B, K, N/K, T, S], -inf where a query does not see a key."""
        q_BTKnH = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        score = jnp.einsum("btknh,bskh->bknts", q_BTKnH, k, preferred_element_type=jnp.float32)
        return where(self.seen_BTS[:, None, None], score, -jnp.inf)


def _log_sum_exp(score: Array) -> Array:
    peak = jnp.maximum(score.max(-1), HIDDEN)
    return peak + jnp.log(jnp.exp(score - peak[..., None]).sum(-1))


def _by_query(x_BKnT: Array) -> Array:
    """[B, K, N/K, T] as [B, T, N]."""
    x = jnp.moveaxis(x_BKnT, 3, 1)
    return x.reshape(*x.shape[:2], -1)
