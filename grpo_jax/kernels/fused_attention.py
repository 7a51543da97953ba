"""Attention of completions to their prompt and to themselves: one kernel call for each, merged.

A kernel returns its output and the log-sum-exp of its scores, which give the weights of the merge.
JAX cannot differentiate such kernels, or does it wrongly, so the merge has its own backward pass:
it calls each kernel's backward pass with the merged output and log-sum-exp, as in ring attention
(Liu et al. 2023, arXiv:2310.01889).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from grpo_jax.devices import by_shard, sharding
from grpo_jax.kernels.masked_attention import MaskedAttention
from grpo_jax.structs import Array, ModelConfig

KEPT = "attention"  # the remat policy's name for a kernel's results

# Logical axes of prompts' and of lanes' queries, keys and values, and of arrays without heads.
_ROWS, _HEADS = "shard_rows", "attention_heads"
_OF_PROMPT, _OF_LANES = (_ROWS, None, _HEADS, None), (_ROWS, None, None, _HEADS, None)
_SEGMENTS_OF_PROMPT, _SEGMENTS_OF_LANES = (_ROWS, None), (_ROWS, None, None)


@dataclasses.dataclass(frozen=True)
class FusedAttention(abc.ABC):
    """The functions of `attention.py`, computed by a kernel that also returns the log-sum-exp."""

    shares_lanes = True
    keeps = False  # remat "dots" keeps the output: the kernel runs once

    mesh: Mesh | None = None  # rows and heads are split over it; None: one device
    rows: str = _ROWS  # the logical axis of the rows

    def needs_lanes(self, width: int) -> bool:
        """Always."""
        return True

    @abc.abstractmethod
    def kernel(self, *, causal: bool, window: int | None = None) -> Any:
        """One kernel: attention of queries [B, T, N, H] to keys and values [B, S, K, H].

        With a `window`, which only a causal kernel has, a query sees that many keys, itself
        included. `with_lse(q, k, v, segment_BT, segment_BS)` returns the output and the log-sum-exp
        of the scores, float32 [B, T, N]. `gradients(q, k, v, segment_BT, segment_BS, out, lse,
        by_out)` returns the gradients by q, k and v; `out` and `lse` may cover more keys than `k`.
        A query sees the keys of its own segment; segment 0 is padding.
        """

    def causal(
        self,
        q_BTNH: Array,
        k_BTKH: Array,
        v_BTKH: Array,
        segment_BT: Array,
        window: int | None,
        cap: float | None = None,
    ) -> Array:
        """As `attention.causal`."""
        assert cap is None, "the kernels do not cap scores; `why_uncapped` says so before"
        k_BTKH, v_BTKH = (self._divisible(x, q_BTNH) for x in (k_BTKH, v_BTKH))
        return _causal(self, window, _scaled(q_BTNH), k_BTKH, v_BTKH, segment_BT)

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
        """As `attention.shared_prefix`."""
        assert cap is None, "the kernels do not cap scores; `why_uncapped` says so before"
        there_PQ = jnp.arange(prefix_k_PQKH.shape[1])[None] < prefix_length_P[:, None]
        keys = k_PWTKH, v_PWTKH, prefix_k_PQKH, prefix_v_PQKH
        keys = (self._divisible(x, q_PWTNH) for x in keys)
        in_text_PWT = prefix_length_P[:, None, None] + position_PWT
        where = segment_PWT, there_PQ.astype(jnp.int32), in_text_PWT
        return _shared_prefix(self, window, _scaled(q_PWTNH), *keys, *where)

    def kept(self, out: Array, lse: Array) -> tuple[Array, Array]:
        """The results, named KEPT for the remat policy if `keeps`."""
        name = functools.partial(checkpoint_name, name=KEPT)
        return (name(out), name(lse)) if self.keeps else (out, lse)

    def _divisible(self, k: Array, q: Array) -> Array:
        """Repeats KV heads that the head shards do not divide, so that keys shard like queries."""
        shards = sharding.num_head_shards(self.mesh) if self.mesh and self.rows == _ROWS else 1
        return k if k.shape[-2] % shards == 0 else jnp.repeat(k, q.shape[-2] // k.shape[-2], -2)

    def by_device(self, f: Callable, axes: Sequence, out_axes: Sequence, *arrays: Array):
        """Runs `f` on each device's parts of the arrays: XLA does not split a kernel itself."""
        if self.mesh is None:
            return f(*arrays)
        axes, out_axes = (
            [tuple(self.rows if name == _ROWS else name for name in names) for names in of]
            for of in (axes, out_axes)
        )
        return by_shard.by_head_shard(self.mesh, f, axes, out_axes)(*arrays)


def why_uncapped(model: ModelConfig) -> str:
    """Why none of the kernels can be used for a model, or ""."""
    if model.attention_cap is None:
        return ""
    return f"the model caps its attention scores at {model.attention_cap:g}, which it does not do"


def _scaled(q: Array) -> Array:
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _causal(
    kernels: FusedAttention,
    window: int | None,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_BT: Array,
) -> Array:
    return _causal_forward(kernels, window, q_BTNH, k_BTKH, v_BTKH, segment_BT)[0]


def _causal_forward(kernels: FusedAttention, window: int | None, *arrays: Array):
    kernel = kernels.kernel(causal=True, window=window)

    def forward(q, k, v, segment_BT):
        return kernel.with_lse(q, k, v, segment_BT, segment_BT)

    axes = *(_OF_PROMPT,) * 3, _SEGMENTS_OF_PROMPT
    found = kernels.by_device(forward, axes, (_OF_PROMPT, _OF_PROMPT[:-1]), *arrays)
    out, lse = kernels.kept(*found)
    return out, (*arrays, out, lse)


def _causal_backward(kernels: FusedAttention, window: int | None, residuals, by_out: Array):
    kernel = kernels.kernel(causal=True, window=window)

    def backward(q, k, v, segment_BT, out, lse, by_out):
        return kernel.gradients(q, k, v, segment_BT, segment_BT, out, lse, by_out)

    axes = *(_OF_PROMPT,) * 3, _SEGMENTS_OF_PROMPT, _OF_PROMPT, _OF_PROMPT[:-1], _OF_PROMPT
    return *kernels.by_device(backward, axes, (_OF_PROMPT,) * 3, *residuals, by_out), None


_causal.defvjp(_causal_forward, _causal_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _shared_prefix(
    kernels: FusedAttention,
    window: int | None,
    q_PWTNH: Array,
    k_PWTKH: Array,
    v_PWTKH: Array,
    prefix_k_PQKH: Array,
    prefix_v_PQKH: Array,
    segment_PWT: Array,
    there_PQ: Array,
    in_text_PWT: Array,
) -> Array:
    keys = k_PWTKH, v_PWTKH, prefix_k_PQKH, prefix_v_PQKH
    arrays = q_PWTNH, *keys, segment_PWT, there_PQ, in_text_PWT
    return _shared_prefix_forward(kernels, window, *arrays)[0]


_AXES = (
    *(_OF_LANES,) * 3,
    *(_OF_PROMPT,) * 2,
    _SEGMENTS_OF_LANES,
    _SEGMENTS_OF_PROMPT,
    _SEGMENTS_OF_LANES,
)


def _by_lane(x: Array) -> Array:
    """[P, W, T, ...] as [P * W, T, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _by_prompt(x: Array) -> Array:
    """[P, W, T, ...] as [P, W * T, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _to_lanes(x: Array, like_PWT: Array) -> Array:
    """The inverse of `_by_lane` and `_by_prompt`."""
    return x.reshape(*like_PWT.shape[:3], *x.shape[2:])


def _two_kernels(
    kernels: FusedAttention,
    window: int | None,
    q: Array,
    k: Array,
    v: Array,
    prefix_k: Array,
    prefix_v: Array,
    segment_PWT: Array,
    there_PQ: Array,
    in_text_PWT: Array,
):
    """For each of the two parts: the kernel, the query layout that it takes, and its arguments."""
    own = _by_lane(q), _by_lane(k), _by_lane(v)
    segment_BT = segment_PWT.reshape(-1, segment_PWT.shape[2])
    prompt = _by_prompt(q), prefix_k, prefix_v
    ones = jnp.ones((q.shape[0], q.shape[1] * q.shape[2]), jnp.int32)
    if window is None:
        to_prompt = kernels.kernel(causal=False)
    else:
        past_PTQ = _by_prompt(in_text_PWT)[..., None] - jnp.arange(prefix_k.shape[1])[None, None]
        to_prompt = MaskedAttention((past_PTQ < window) & (there_PQ > 0)[:, None])
    return (
        (kernels.kernel(causal=True, window=window), _by_lane, (*own, segment_BT, segment_BT)),
        (to_prompt, _by_prompt, (*prompt, ones, there_PQ)),
    )


def _shared_prefix_forward(kernels: FusedAttention, window: int | None, *arrays: Array):
    def forward(q, *others):
        both = _two_kernels(kernels, window, q, *others)
        found = [kernel.with_lse(*args) for kernel, _, args in both]
        outs, lses = zip(*(tuple(_to_lanes(x, q) for x in pair) for pair in found))
        lse = jnp.logaddexp(*lses)
        weights = [jnp.exp(own - lse)[..., None] for own in lses]
        out = sum(w * own.astype(jnp.float32) for w, own in zip(weights, outs))
        return out.astype(q.dtype), lse

    found = kernels.by_device(forward, _AXES, (_OF_LANES, _OF_LANES[:-1]), *arrays)
    out, lse = kernels.kept(*found)
    return out, (*arrays, out, lse)


def _shared_prefix_backward(kernels: FusedAttention, window: int | None, residuals, by_out: Array):
    def backward(*arrays_and_results):
        *arrays, out, lse, by_out = arrays_and_results
        (own, lanes, own_args), (prompt, rows, prompt_args) = _two_kernels(kernels, window, *arrays)
        by_own = own.gradients(*own_args, *map(lanes, (out, lse, by_out)))
        by_prompt = prompt.gradients(*prompt_args, *map(rows, (out, lse, by_out)))
        q = arrays[0]
        by_q = _to_lanes(by_own[0], q) + _to_lanes(by_prompt[0], q)
        return by_q, *(_to_lanes(x, q) for x in by_own[1:]), *by_prompt[1:]

    axes = *_AXES, _OF_LANES, _OF_LANES[:-1], _OF_LANES
    return *kernels.by_device(backward, axes, _AXES[:5], *residuals, by_out), None, None, None


_shared_prefix.defvjp(_shared_prefix_forward, _shared_prefix_backward)
