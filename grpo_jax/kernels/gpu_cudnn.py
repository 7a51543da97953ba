"""Attention of scoring and training by cuDNN's fused kernel, for NVIDIA GPUs.

The kernel takes lengths and causality, never a mask, so each completion needs its own lane;
`fused_attention.py` merges two runs of it. `jax.nn.dot_product_attention` rounds the log-sum-exp to
the inputs' dtype and drops its gradient, so this file calls the private functions beneath it,
forward and backward. Neither is public in JAX; `_READ_IN` has the versions in which they were read.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import Mesh

from grpo_jax.devices import sharding
from grpo_jax.kernels import attention, fused_attention
from grpo_jax.kernels.attention import AttentionKernels
from grpo_jax.kernels.fused_attention import FusedAttention
from grpo_jax.structs import Array, ModelConfig

_READ_IN = ((0, 10), (0, 11), (0, 12))


def why_unavailable(model: ModelConfig, mesh: Mesh, dtype: Any) -> str:
    """The reason why the kernel cannot be used; "" if it can."""
    if not sharding.is_gpu(mesh):
        return f"it is for GPUs, and the devices are {mesh.devices.flat[0].platform}s"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it takes bfloat16, and model.dtype is {jnp.dtype(dtype)}"
    if model.head_size % 8 or model.head_size > 128:
        return f"the heads are of size {model.head_size}, and it takes multiples of 8 up to 128"
    return fused_attention.why_uncapped(model)


def choose(model: ModelConfig, mesh: Mesh) -> AttentionKernels:
    """The kernel; plain XLA, with a warning, for versions of JAX that `_READ_IN` does not name."""
    if jax.__version_info__[:2] not in _READ_IN:
        warnings.warn(
            f"Attention by XLA in place of cuDNN, whose backward pass was not tested with JAX "
            f"{jax.__version__}.",
            stacklevel=2,
        )
        return attention
    return Cudnn(mesh=mesh, rows=sharding.row_axis(mesh, model.num_kv_heads))


@dataclasses.dataclass(frozen=True)
class Cudnn(FusedAttention):
    """Attention by cuDNN's kernel; on CUDA only."""

    shares_lanes = False
    keeps = True

    def kernel(self, *, causal: bool, window: int | None = None) -> _Kernel:
        return _Kernel(causal, window)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """As `FusedAttention.kernel`; each row is one segment, at the row's beginning."""

    causal: bool
    window: int | None

    def with_lse(self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array):
        lengths = _length(segment_BT), _length(segment_BS)
        out, lse_BNT = _forward(self.causal, self.window, q, k, v, *lengths)
        there_BT1 = segment_BT[..., None] > 0  # elsewhere the kernel's output is undefined
        lse = jnp.where(there_BT1, jnp.swapaxes(lse_BNT, 1, 2), -jnp.inf)
        return jnp.where(there_BT1[..., None], out, 0), lse

    def gradients(
        self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array, out, lse, by_out
    ) -> tuple[Array, Array, Array]:
        lengths = _length(segment_BT), _length(segment_BS)
        lse = jnp.where(segment_BT[..., None] > 0, lse, 1e30)  # padding gets weight 0
        lse_BNT = jnp.swapaxes(lse, 1, 2)
        grads = _backward(self.causal, self.window, q, k, v, *lengths, out, lse_BNT, by_out)
        theres = segment_BT > 0, segment_BS > 0, segment_BS > 0
        return tuple(
            jnp.where(there[..., None, None], grad, 0) for there, grad in zip(theres, grads)
        )


def _length(segment_BT: Array) -> Array:
    """The length of each row, int32 [B]; at least 1, since the kernel takes no empty row."""
    return jnp.maximum((segment_BT > 0).sum(1, dtype=jnp.int32), 1)


def _mask(causal: bool) -> fused.MaskType:
    return fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING


def _forward(
    causal: bool, window: int | None, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, length_B: Array,
    of_keys_B: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """The output [B, T, N, H] and the log-sum-exp of the scores, float32 [B, N, T]."""
    return fused.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, q_seqlen=length_B, kv_seqlen=of_keys_B, mask_type=_mask(causal),
        qkv_layout="BTNH", sliding_window_length=window, return_residual=True,
    )  # fmt: skip


def _backward(
    causal: bool, window: int | None, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, length_B: Array,
    of_keys_B: Array, out_BTNH: Array, lse_BNT: Array, by_out_BTNH: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The gradients by queries, keys and values."""
    none = jnp.zeros(0, q_BTNH.dtype)
    arrays = q_BTNH, k_BSKH, v_BSKH, none, length_B, of_keys_B, none, none, none, none
    # JAX 0.12 added two arguments: a function that changes scores, and its inputs.
    given, function = (((),), (None,)) if jax.__version_info__ >= (0, 12) else ((), ())
    return fused._dot_product_attention_bwd_rule(
        1.0, 42, 0.0, (False, False), _mask(causal), fused.AttentionLayout.BTNH.value, window,
        *function, True, False, (*arrays, *given, lse_BNT, out_BTNH), by_out_BTNH,
    )[:3]  # fmt: skip
