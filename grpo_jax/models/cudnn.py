"""Attention of scoring and training by cuDNN's fused kernel, for NVIDIA GPUs.

It is given lengths and causality, never a mask, so each completion needs a lane of its own;
`merged.py` has what is made of two runs of the kernel. `jax.nn.dot_product_attention` rounds the
log-sum-exp to the inputs' dtype and drops its gradient: called is what that calls, and its backward
pass, which are no public functions of JAX. `_READ_IN` has the versions in which they were read.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.models import attention
from grpo_jax.models.merged import Merged
from grpo_jax.structs import Array, ModelConfig

_READ_IN = ((0, 10), (0, 12))


def choose(model: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """The functions of `model.attention = "cudnn"`, or plain XLA's, with a warning, where JAX is of
    a version that was not read.

    Raises ValueError where the kernel cannot be had.
    """
    obstacle = ""
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        obstacle = f"it is for GPUs, and the devices are {mesh.devices.flat[0].platform}s"
    elif model.window_per_layer is not None:
        obstacle = "the model has sliding windows, which it does not take layer by layer"
    elif jnp.dtype(dtype) != jnp.bfloat16:
        obstacle = f"it takes bfloat16, and model.dtype is {jnp.dtype(dtype)}"
    elif model.head_size % 8 or model.head_size > 128:
        obstacle = f"the heads are of size {model.head_size}, and it takes multiples of 8 up to 128"
    if obstacle:
        raise ValueError(f'model.attention = "cudnn": {obstacle}. Set it to "xla".')
    if jax.__version_info__[:2] not in _READ_IN:
        warnings.warn(
            f"Attention by XLA in place of cuDNN, whose backward pass was not tested with JAX "
            f"{jax.__version__}.",
            stacklevel=2,
        )
        return attention
    return Cudnn(mesh=mesh, rows=sharding.row_axis(mesh, model.num_kv_heads))


@dataclasses.dataclass(frozen=True)
class Cudnn(Merged):
    """The kernel, on CUDA alone."""

    shares_lanes = False

    def part(self, *, causal: bool) -> _Part:
        return _Part(causal)


@dataclasses.dataclass(frozen=True)
class _Part:
    """As `Merged.part`; what is there of a row stands at its beginning, in one segment."""

    causal: bool

    def with_lse(self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array):
        lengths = _length(segment_BT), _length(segment_BS)
        out, lse = _forward(self.causal, q, k, v, *lengths)
        there_B1T = segment_BT[:, None] > 0  # the kernel writes nothing of use elsewhere
        return jnp.where(there_B1T[..., None], out, 0), jnp.where(there_B1T, lse, -jnp.inf)

    def gradients(
        self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array, out, lse, by_out
    ) -> tuple[Array, Array, Array]:
        lengths = _length(segment_BT), _length(segment_BS)
        lse = jnp.where(segment_BT[:, None] > 0, lse, 1e30)  # no weight for what is not there
        grads = _backward(self.causal, q, k, v, *lengths, out, lse, by_out)
        theres = segment_BT > 0, segment_BS > 0, segment_BS > 0
        return tuple(
            jnp.where(there[:, None, :, None], grad, 0) for there, grad in zip(theres, grads)
        )


def _length(segment_BT: Array) -> Array:
    """How much is there of each row, int32 [B]; at least 1, as no row may be empty."""
    return jnp.maximum((segment_BT > 0).sum(1, dtype=jnp.int32), 1)


def _mask(causal: bool) -> fused.MaskType:
    return fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING


def _forward(
    causal: bool, q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, length_B: Array, of_keys_B: Array
) -> tuple[Array, Array]:
    """The output and the log-sum-exp of the scores, float32 [B, N, T]."""
    return fused.dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, q_seqlen=length_B, kv_seqlen=of_keys_B, mask_type=_mask(causal),
        qkv_layout="BNTH", return_residual=True,
    )  # fmt: skip


def _backward(
    causal: bool, q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, length_B: Array, of_keys_B: Array,
    out_BNTH: Array, lse_BNT: Array, by_out_BNTH: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The gradients by queries, keys and values."""
    none = jnp.zeros(0, q_BNTH.dtype)
    arrays = q_BNTH, k_BKSH, v_BKSH, none, length_B, of_keys_B, none, none, none, none
    # A function that changes scores, and what it is given, came with 0.12.
    given, function = (((),), (None,)) if jax.__version_info__ >= (0, 12) else ((), ())
    return fused._dot_product_attention_bwd_rule(
        1.0, 42, 0.0, (False, False), _mask(causal), fused.AttentionLayout.BNTH.value, None,
        *function, True, False, (*arrays, *given, lse_BNT, out_BNTH), by_out_BNTH,
    )[:3]  # fmt: skip
