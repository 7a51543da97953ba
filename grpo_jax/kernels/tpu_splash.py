"""Attention of scoring and training by the splash kernels that JAX ships for TPUs.

The scores of a block of queries with a block of keys never leave the chip, and blocks that the mask
hides are skipped. `fused_attention.py` merges two runs of the kernel. Its backward pass is not a
public function of JAX; `_READ_IN` has the versions in which it was read and tested.
"""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import Mesh

from grpo_jax.devices import sharding
from grpo_jax.kernels import attention, fused_attention
from grpo_jax.kernels.attention import AttentionKernels
from grpo_jax.kernels.fused_attention import FusedAttention
from grpo_jax.structs import Array, ModelConfig

_READ_IN = ((0, 10), (0, 11), (0, 12))
_LANES = 128  # the kernel takes multiples of it as lengths


def choose(option: str, model: ModelConfig, mesh: Mesh) -> AttentionKernels:
    """The attention functions that `config.model.attention` names: these kernels, or plain XLA.

    "auto" takes the kernels on TPUs. Raises ValueError if "splash" is set and not available.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    reason = ""
    if not on_tpu:
        reason = f"they are for TPUs, and the devices are {mesh.devices.flat[0].platform}s"
    elif jax.__version_info__[:2] not in _READ_IN:
        reason = f"their backward pass was not tested with JAX {jax.__version__}"
    else:
        reason = fused_attention.why_uncapped(model)
    if option == "splash" and reason:
        raise ValueError(
            f'model.attention = "splash": {reason}. Set it to "xla", or to "auto", which takes '
            "them where they are available."
        )
    if option == "xla" or reason:
        if on_tpu and option == "auto":
            warnings.warn(f"Attention by XLA without kernels: {reason}.", stacklevel=2)
        return attention
    return Splash(mesh=mesh, rows=sharding.row_axis(mesh, model.num_kv_heads))


@dataclasses.dataclass(frozen=True)
class Splash(FusedAttention):
    """Attention by the splash kernels, compiled for a TPU or interpreted for tests."""

    interpret: bool = False

    def kernel(self, *, causal: bool, window: int | None = None) -> _Kernel:
        return _Kernel(causal, window, self.interpret)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """As `FusedAttention.kernel`.

    Queries and keys are padded to lengths that the kernel takes; no query sees the padding.
    """

    causal: bool
    window: int | None
    interpret: bool

    def with_lse(self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array):
        q, k, v = map(_heads_first, (q, k, v))
        rows = _padded(q, k, v), _segments(segment_BT, segment_BS)
        out, (lse,) = jax.vmap(self._kernel(q, k))(*rows[0], rows[1])
        return tuple(_heads_first(x)[:, : q.shape[2]] for x in (out, lse))

    def gradients(
        self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array, out, lse, by_out
    ) -> tuple[Array, Array, Array]:
        q, k, v, out, lse, by_out = map(_heads_first, (q, k, v, out, lse, by_out))
        kernel = self._kernel(q, k)
        names = "save_residuals mask_value is_mqa block_sizes residual_checkpoint_name"
        names += " mask_function attn_logits_soft_cap interpret"
        options = [kernel.kwargs[name] for name in names.split()]

        def row(q, k, v, segments, out, lse, by_out):
            masks = kernel.dq_mask_info, kernel.dkv_mask_info
            residuals = q, k, v, segments, None, out, lse, *masks
            return kernel_lib._splash_attention_bwd(*options, residuals, by_out)[3:6]

        rows = *_padded(q, k, v), _segments(segment_BT, segment_BS), *_padded(out, lse, by_out)
        lengths = q.shape[2], k.shape[2], k.shape[2]
        return tuple(_heads_first(x)[:, :n] for x, n in zip(jax.vmap(row)(*rows), lengths))

    def _kernel(self, q: Array, k: Array) -> kernel_lib.SplashAttentionKernel:
        queries, keys = (-(-x.shape[2] // _LANES) * _LANES for x in (q, k))
        if self.window is not None:
            mask = mask_lib.LocalMask((queries, keys), (self.window - 1, 0), offset=0)
        else:
            mask = (mask_lib.CausalMask if self.causal else mask_lib.FullMask)((queries, keys))
        block_q, block_kv = map(_block, (queries, keys))
        return kernel_lib.make_splash_mha(
            mask=mask_lib.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=kernel_lib.BlockSizes(
                block_q=block_q,
                block_kv=block_kv,
                block_q_dkv=block_q,
                block_kv_dkv=block_kv,
                block_q_dq=block_q,
                block_kv_dq=block_kv,
            ),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            interpret=self.interpret,
        )


def _heads_first(x: Array) -> Array:
    """[B, T, heads, ...] as [B, heads, T, ...], and back."""
    return jnp.swapaxes(x, 1, 2)


def _block(length: int) -> int:
    """The kernel's block size for this number of queries or keys."""
    return next(size for size in (512, 256, _LANES) if length % size == 0)


def _padded(*arrays: Array) -> tuple[Array, ...]:
    """Arrays [B, heads, T, ...] with zeros after their tokens."""

    def pad(x: Array) -> Array:
        more = -x.shape[2] % _LANES
        return jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3))

    return tuple(map(pad, arrays))


def _segments(segment_BT: Array, segment_BS: Array) -> kernel_lib.SegmentIds:
    """Segment ids, padded with -1 for queries and -2 for keys, so that padding sees nothing."""
    fill = lambda x, value: jnp.pad(  # noqa: E731
        x, ((0, 0), (0, -x.shape[1] % _LANES)), constant_values=value
    )
    return kernel_lib.SegmentIds(fill(segment_BT, -1), fill(segment_BS, -2))
