"""Attention of packed rows, block by block, in plain XLA: for CPUs, unless completions are short.

A block of queries reads only the blocks of keys that some of its tokens see. Their number is read
from the row when the program runs, so the time follows from the texts and not from the longest that
there may be; and since a row needs no lanes, no token is moved and no lane is padded. Softmax runs
over blocks of keys, and the backward pass computes it again from the log-sum-exp, both as in
FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2). Axes beside those of
`structs.py`:

    I blocks of queries    X tokens of a block, of all query heads of one key-value head
    Y keys of a block      S keys of a row, padded by a block at least
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from grpo_jax.kernels import attention
from grpo_jax.kernels.attention import HIDDEN, Seen, capped
from grpo_jax.kernels.fused_attention import KEPT
from grpo_jax.kernels.primitives import split_index, where
from grpo_jax.structs import Array


def fits(mesh: Mesh) -> bool:
    """Whether the devices are CPUs that each have rows of their own.

    Each row has its own number of blocks, so XLA cannot divide one over devices.
    """
    return mesh.devices.flat[0].platform == "cpu" and mesh.devices.size == mesh.shape["data"]


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """The functions of `attention.py`, but rows of long completions are computed by block."""

    shares_lanes = True

    block: int = 32  # tokens
    narrow: int = 64  # completions of so many entries stand in lanes: blocks would save nothing

    causal = staticmethod(attention.causal)
    shared_prefix = staticmethod(attention.shared_prefix)

    def needs_lanes(self, width: int) -> bool:
        """Whether completions of up to `width` entries are to be laid out in lanes."""
        return width <= self.narrow

    def by_row(
        self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, seen: Seen, cap: float | None = None
    ) -> Array:
        """As `attention.by_row`."""
        rows = [
            _row(self.block, cap, *row, Seen(*(None if x is None else x[b] for x in seen)))
            for b, row in enumerate(zip(q_BTNH, k_BTKH, v_BTKH))
        ]
        return jnp.stack(rows)


class _Blocks(NamedTuple):
    """What each block of queries sees, [I, ...]: of the prompts, and then of its own texts."""

    of_prompt_I2: Array  # the first key, and the number of blocks of keys
    own_I2: Array
    begin_I2X: Array  # of both: the first key that a query sees ...
    end_I2X: Array  # ... and the key after the last

    @staticmethod
    def of(seen: Seen, block: int) -> _Blocks:
        at_T = jnp.arange(len(seen.begin_BT), dtype=jnp.int32)
        none = jnp.zeros_like(at_T)
        begin = none if seen.prompt_begin_BT is None else seen.prompt_begin_BT
        end = none if seen.prompt_end_BT is None else seen.prompt_end_BT
        begin_2T = jnp.stack([begin, seen.begin_BT])
        end_2T = jnp.stack([end, at_T + 1])
        more = -len(at_T) % block
        begin_2IX, end_2IX = (
            jnp.pad(x, ((0, 0), (0, more))).reshape(2, -1, block) for x in (begin_2T, end_2T)
        )
        some = end_2IX > begin_2IX
        first_2I = where(some, begin_2IX, len(at_T)).min(2)
        reach_2I = jnp.maximum(where(some, end_2IX, 0).max(2) - first_2I, 0)
        number_2I, _ = split_index(reach_2I + block - 1, block)
        of_prompt, own = jnp.stack([first_2I, number_2I], axis=2)
        swapped = (jnp.swapaxes(x, 0, 1) for x in (begin_2IX, end_2IX))
        return _Blocks(of_prompt, own, *swapped)

    def keys(self, step: Array, block: int) -> tuple[Array, Array]:
        """Of one block of queries: where the step's block of keys begins, and which are seen.

        bool [X, Y] with X tokens alone. The prompt's blocks come first.
        """
        (first, number), (own_first, _) = self.of_prompt_I2, self.own_I2
        of_prompt = step < number
        begin = where(of_prompt, first + step * block, own_first + (step - number) * block)
        at_1Y = (begin + jnp.arange(block, dtype=jnp.int32))[None]
        low, high = (where(of_prompt, *x_2X)[:, None] for x_2X in (self.begin_I2X, self.end_I2X))
        return begin, (at_1Y >= low) & (at_1Y < high)

    @property
    def steps(self) -> Array:
        """Of one block of queries: the number of blocks of keys that it sees."""
        return self.of_prompt_I2[1] + self.own_I2[1]


class _Arrays(NamedTuple):
    """The layout of a row's arrays by block."""

    tokens: int  # T
    heads: int  # K
    block: int

    def queries(self, x_TNH: Array) -> Array:
        """Queries, outputs and their gradients [I, K, X, H]."""
        x = jnp.pad(x_TNH, ((0, -self.tokens % self.block), (0, 0), (0, 0)))
        x = x.reshape(-1, self.block, self.heads, x.shape[1] // self.heads, x.shape[2])
        return x.transpose(0, 2, 3, 1, 4).reshape(x.shape[0], self.heads, -1, x.shape[-1])

    def tokenwise(self, x_IKXH: Array) -> Array:
        """The inverse of `queries`."""
        x = x_IKXH.reshape(*x_IKXH.shape[:2], -1, self.block, x_IKXH.shape[-1])
        x = x.transpose(0, 3, 1, 2, 4).reshape(-1, x.shape[1] * x.shape[2], x.shape[-1])
        return x[: self.tokens]

    def keys(self, x_TKH: Array) -> Array:
        """Keys and values [K, S, H]."""
        more = -self.tokens % self.block + self.block
        return jnp.pad(jnp.swapaxes(x_TKH, 0, 1), ((0, 0), (0, more), (0, 0)))

    def of_keys(self, x_KSH: Array) -> Array:
        """The inverse of `keys`."""
        return jnp.swapaxes(x_KSH[:, : self.tokens], 0, 1)

    def read(self, x_KSH: Array, begin: Array) -> Array:
        """A block of keys, [K, Y, H]."""
        return lax.dynamic_slice_in_dim(x_KSH, begin, self.block, 1, allow_negative_indices=False)

    def add(self, x_KSH: Array, begin: Array, more_KYH: Array) -> Array:
        more_KYH = self.read(x_KSH, begin) + more_KYH
        return lax.dynamic_update_slice_in_dim(
            x_KSH, more_KYH, begin, 1, allow_negative_indices=False
        )


def _scores(cap: float | None, q_KXH: Array, k_KYH: Array, seen: Array) -> Array:
    """Scores [K, X, Y], HIDDEN where a query does not see a key; `seen` [X, Y] of tokens alone."""
    score = jnp.einsum("kxh,kyh->kxy", q_KXH, k_KYH, preferred_element_type=jnp.float32)
    by_head = capped(score, cap).reshape(len(score), -1, *seen.shape)
    return where(seen[None, None], by_head, HIDDEN).reshape(score.shape)


def _scaled(q: Array) -> Array:
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row(
    block: int, cap: float | None, q_TNH: Array, k_TKH: Array, v_TKH: Array, seen: Seen
) -> Array:
    """The attention of one row, [T, N, H]; `seen` has no axis of rows."""
    return _forward(block, cap, q_TNH, k_TKH, v_TKH, seen)[0]


# The function and its derivative need it; it is traced once.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _forward(
    block: int, cap: float | None, q_TNH: Array, k_TKH: Array, v_TKH: Array, seen: Seen
) -> tuple[Array, tuple]:
    arrays = _Arrays(*k_TKH.shape[:2], block)
    k_KSH, v_KSH = arrays.keys(k_TKH), arrays.keys(v_TKH)

    def of_queries(_, block_of: tuple[Array, _Blocks]):
        q_KXH, blocks = block_of

        def of_keys(step: Array, carry: tuple[Array, Array, Array]):
            sum_KXH, peak_KX, mass_KX = carry
            begin, seen = blocks.keys(step, block)
            score = _scores(cap, q_KXH, arrays.read(k_KSH, begin), seen)
            higher_KX = jnp.maximum(peak_KX, score.max(-1))
            weight = jnp.exp(score - higher_KX[..., None])
            shrink_KX = jnp.exp(peak_KX - higher_KX)
            v_KYH = arrays.read(v_KSH, begin)
            more = jnp.einsum("kxy,kyh->kxh", weight.astype(v_KYH.dtype), v_KYH,
                              preferred_element_type=jnp.float32)  # fmt: skip
            sum_KXH = sum_KXH * shrink_KX[..., None] + more
            return sum_KXH, higher_KX, mass_KX * shrink_KX + weight.sum(-1)

        none_KX = jnp.zeros(q_KXH.shape[:2])
        start = jnp.zeros(q_KXH.shape), none_KX + HIDDEN, none_KX
        sum_KXH, peak_KX, mass_KX = jax.lax.fori_loop(0, blocks.steps, of_keys, start)
        return None, (sum_KXH / mass_KX[..., None], peak_KX + jnp.log(mass_KX))

    blocks_of = arrays.queries(_scaled(q_TNH)), _Blocks.of(seen, block)
    _, (out_IKXH, lse_IKX) = jax.lax.scan(of_queries, None, blocks_of)
    name = functools.partial(checkpoint_name, name=KEPT)
    out_TNH = name(arrays.tokenwise(out_IKXH).astype(q_TNH.dtype))
    return out_TNH, (q_TNH, k_TKH, v_TKH, seen, out_TNH, name(lse_IKX))


def _backward(block: int, cap: float | None, residuals: tuple, by_out_TNH: Array) -> tuple:
    q_TNH, k_TKH, v_TKH, seen, out_TNH, lse_IKX = residuals
    arrays = _Arrays(*k_TKH.shape[:2], block)
    k_KSH, v_KSH = arrays.keys(k_TKH), arrays.keys(v_TKH)
    by_out_IKXH = arrays.queries(by_out_TNH)
    mean_IKX = (by_out_IKXH.astype(jnp.float32) * arrays.queries(out_TNH)).sum(-1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_queries(by_keys: tuple[Array, Array], block_of: tuple):
        q_KXH, by_out_KXH, mean_KX, lse_KX, blocks = block_of

        def of_keys(step: Array, carry: tuple[Array, Array, Array]):
            by_q, by_k, by_v = carry
            begin, seen = blocks.keys(step, block)
            k_KYH, v_KYH = arrays.read(k_KSH, begin), arrays.read(v_KSH, begin)
            score = _scores(cap, q_KXH, k_KYH, seen)
            weight = jnp.exp(score - lse_KX[..., None])
            by_weight = product("kxh,kyh->kxy", by_out_KXH, v_KYH)
            by_score = weight * (by_weight - mean_KX[..., None])
            if cap is not None:  # the derivative of the tanh
                by_score *= where(score > HIDDEN, 1 - (score / cap) ** 2, 0.0)
            by_score, weight = by_score.astype(q_KXH.dtype), weight.astype(q_KXH.dtype)
            by_k = arrays.add(by_k, begin, product("kxy,kxh->kyh", by_score, q_KXH))
            by_v = arrays.add(by_v, begin, product("kxy,kxh->kyh", weight, by_out_KXH))
            return by_q + product("kxy,kyh->kxh", by_score, k_KYH), by_k, by_v

        start = jnp.zeros(q_KXH.shape), *by_keys
        by_q, *by_keys = jax.lax.fori_loop(0, blocks.steps, of_keys, start)
        return tuple(by_keys), by_q

    none = jnp.zeros(k_KSH.shape), jnp.zeros(v_KSH.shape)
    of_blocks = arrays.queries(_scaled(q_TNH)), by_out_IKXH, mean_IKX, lse_IKX
    by_keys, by_q = jax.lax.scan(of_queries, none, (*of_blocks, _Blocks.of(seen, block)))
    by_k, by_v = (arrays.of_keys(x).astype(k_TKH.dtype) for x in by_keys)
    return _scaled(arrays.tokenwise(by_q)).astype(q_TNH.dtype), by_k, by_v, None


_row.defvjp(_forward, _backward)
