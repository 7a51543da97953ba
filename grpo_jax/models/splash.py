"""Attention of scoring and training by the splash kernels that JAX ships for TPUs.

The two functions of `Splash` stand for those of the same names in `attention.py`. The scores of a
block of queries with a block of keys never leave the chip, and blocks that the causal mask hides
are left out.

A completion's attention to its prompt and to itself are two runs of the kernel, merged by their
log-sum-exp. The kernel refuses to be differentiated where it returns that, so the merge has its own
backward pass: each part's, given the merged output and log-sum-exp, as in ring attention (Liu et
al. 2023, arXiv:2310.01889). The kernel's backward pass is no public function of JAX;
`_READ_IN` has the versions in which it was read and tested.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.models import attention
from grpo_jax.structs import Array, ModelConfig

_READ_IN = ((0, 10),)
_LANES = 128  # queries and keys come in multiples of it


def choose(option: str, model: ModelConfig, mesh: Mesh) -> Any:
    """The functions that `config.model.attention` names: these kernels, or plain XLA's.

    "auto" takes the kernels on TPUs. Raises ValueError where they are asked for and cannot be had.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    obstacle = ""
    if not on_tpu:
        obstacle = f"they are for TPUs, and the devices are {mesh.devices.flat[0].platform}s"
    elif model.window_per_layer is not None:
        obstacle = "the model has sliding windows, which they do not take layer by layer"
    elif jax.__version_info__[:2] not in _READ_IN:
        obstacle = f"their backward pass was not tested with JAX {jax.__version__}"
    if option == "splash" and obstacle:
        raise ValueError(
            f'model.attention = "splash": {obstacle}. Set it to "xla", or to "auto", which takes '
            "them where they can be had."
        )
    if option == "xla" or obstacle:
        if on_tpu and option == "auto":
            warnings.warn(f"Attention by XLA without kernels: {obstacle}.", stacklevel=2)
        return attention
    return Splash(mesh=mesh, rows=sharding.row_axis(mesh, model.num_kv_heads))


# Logical axes of queries, keys and values of prompts and of lanes, and of what has no heads.
_ROWS, _HEADS = "shard_rows", "attention_heads"
_OF_PROMPT, _OF_LANES = (_ROWS, None, _HEADS, None), (_ROWS, None, None, _HEADS, None)
_SEGMENTS_OF_PROMPT, _SEGMENTS_OF_LANES = (_ROWS, None), (_ROWS, None, None)


@dataclasses.dataclass(frozen=True)
class Splash:
    """The kernels, compiled for a TPU, or interpreted anywhere for a test."""

    interpret: bool = False
    mesh: Mesh | None = None  # whose devices share the rows and heads; None: one device
    rows: str = _ROWS  # the logical axis by which they share the rows

    def causal(self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, length_B: Array, window) -> Array:
        """As `attention.causal`, of models whose `window` is None."""
        assert window is None, "the kernel's windows are fixed when it is made"
        there_BT = jnp.arange(q_BTNH.shape[1])[None] < length_B[:, None]
        k_BTKH, v_BTKH = (self._divisible(x, q_BTNH) for x in (k_BTKH, v_BTKH))
        return _causal(self, _scaled(q_BTNH), k_BTKH, v_BTKH, there_BT.astype(jnp.int32))

    def shared_prefix(
        self,
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
        """As `attention.shared_prefix`, of models whose `window` is None."""
        assert window is None, "the kernel's windows are fixed when it is made"
        there_PQ = jnp.arange(prefix_k_PQKH.shape[1])[None] < prefix_length_P[:, None]
        keys = k_PLTKH, v_PLTKH, prefix_k_PQKH, prefix_v_PQKH
        keys = (self._divisible(x, q_PLTNH) for x in keys)
        return _shared_prefix(
            self, _scaled(q_PLTNH), *keys, segment_PLT, there_PQ.astype(jnp.int32)
        )

    def _divisible(self, k: Array, q: Array) -> Array:
        """Keys or values with as many heads as split over the devices as the queries' do."""
        shards = sharding.num_head_shards(self.mesh) if self.mesh and self.rows == _ROWS else 1
        return k if k.shape[-2] % shards == 0 else jnp.repeat(k, q.shape[-2] // k.shape[-2], -2)

    def by_device(self, f: Callable, axes: Sequence, out_axes: Sequence, *arrays: Array):
        """`f` on each device's parts of the arrays; XLA does not divide a kernel by itself."""
        if self.mesh is None:
            return f(*arrays)
        axes, out_axes = (
            [tuple(self.rows if name == _ROWS else name for name in names) for names in of]
            for of in (axes, out_axes)
        )
        return sharding.by_head_shard(self.mesh, f, axes, out_axes)(*arrays)


def _scaled(q: Array) -> Array:
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Attention of queries [B, N, T, H] to keys and values [B, K, S, H] of their own segment.

    Queries and keys are numbered by segment, [B, T] and [B, S]. Both are filled up with what no
    query sees to lengths that the kernel takes.
    """

    causal: bool
    interpret: bool

    def with_lse(self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array):
        """The output and the log-sum-exp of the scores, float32 [B, N, T]."""
        rows = _padded(q, k, v), _segments(segment_BT, segment_BS)
        out, (lse,) = jax.vmap(self._kernel(q, k))(*rows[0], rows[1])
        return out[:, :, : q.shape[2]], lse[:, :, : q.shape[2]]

    def gradients(
        self, q: Array, k: Array, v: Array, segment_BT: Array, segment_BS: Array, out, lse, by_out
    ) -> tuple[Array, Array, Array]:
        """By q, k and v, where `out` and `lse` may be of more keys than this part has."""
        kernel = self._kernel(q, k)
        names = "save_residuals mask_value is_mqa block_sizes residual_checkpoint_name"
        names += " mask_function attn_logits_soft_cap interpret"
        options = [kernel.kwargs[name] for name in names.split()]

        def row(q, k, v, segments, out, lse, by_out):
            masks = kernel.dq_mask_info, kernel.dkv_mask_info
            residuals = q, k, v, segments, None, out, lse, *masks
            return kernel_lib._splash_attention_bwd(*options, residuals, by_out)[3:6]

        rows = *_padded(q, k, v), _segments(segment_BT, segment_BS), *_padded(out, lse, by_out)
        by_q, by_k, by_v = jax.vmap(row)(*rows)
        return by_q[:, :, : q.shape[2]], by_k[:, :, : k.shape[2]], by_v[:, :, : k.shape[2]]

    def _kernel(self, q: Array, k: Array) -> kernel_lib.SplashAttentionKernel:
        queries, keys = (-(-x.shape[2] // _LANES) * _LANES for x in (q, k))
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


def _block(length: int) -> int:
    """Queries or keys that the kernel takes at once."""
    return next(size for size in (512, 256, _LANES) if length % size == 0)


def _padded(*arrays: Array) -> tuple[Array, ...]:
    """Arrays [B, heads, T, ...] with zeros after their tokens."""

    def pad(x: Array) -> Array:
        more = -x.shape[2] % _LANES
        return jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3))

    return tuple(map(pad, arrays))


def _segments(segment_BT: Array, segment_BS: Array) -> kernel_lib.SegmentIds:
    """The same, -1 after the queries and -2 after the keys, which see nothing of each other."""
    fill = lambda x, value: jnp.pad(  # noqa: E731
        x, ((0, 0), (0, -x.shape[1] % _LANES)), constant_values=value
    )
    return kernel_lib.SegmentIds(fill(segment_BT, -1), fill(segment_BS, -2))


def _heads_first(x: Array) -> Array:
    """[B, T, heads, ...] as [B, heads, T, ...], and back."""
    return jnp.swapaxes(x, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(splash: Splash, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, there_BT: Array) -> Array:
    return _causal_forward(splash, q_BTNH, k_BTKH, v_BTKH, there_BT)[0]


def _causal_forward(splash: Splash, *arrays: Array):
    part = _Part(True, splash.interpret)

    def forward(q, k, v, there_BT):
        out, lse = part.with_lse(*map(_heads_first, (q, k, v)), jnp.ones_like(there_BT), there_BT)
        return _heads_first(out), _heads_first(lse)

    axes = *(_OF_PROMPT,) * 3, _SEGMENTS_OF_PROMPT
    out, lse = splash.by_device(forward, axes, (_OF_PROMPT, _OF_PROMPT[:-1]), *arrays)
    return out, (*arrays, out, lse)


def _causal_backward(splash: Splash, residuals, by_out: Array):
    part = _Part(True, splash.interpret)

    def backward(q, k, v, there_BT, out, lse, by_out):
        segments = jnp.ones_like(there_BT), there_BT
        q, k, v, out, lse, by_out = map(_heads_first, (q, k, v, out, lse, by_out))
        return tuple(map(_heads_first, part.gradients(q, k, v, *segments, out, lse, by_out)))

    axes = *(_OF_PROMPT,) * 3, _SEGMENTS_OF_PROMPT, _OF_PROMPT, _OF_PROMPT[:-1], _OF_PROMPT
    return *splash.by_device(backward, axes, (_OF_PROMPT,) * 3, *residuals, by_out), None


_causal.defvjp(_causal_forward, _causal_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shared_prefix(
    splash: Splash,
    q_PLTNH: Array,
    k_PLTKH: Array,
    v_PLTKH: Array,
    prefix_k_PQKH: Array,
    prefix_v_PQKH: Array,
    segment_PLT: Array,
    there_PQ: Array,
) -> Array:
    arrays = q_PLTNH, k_PLTKH, v_PLTKH, prefix_k_PQKH, prefix_v_PQKH, segment_PLT, there_PQ
    return _shared_prefix_forward(splash, *arrays)[0]


_AXES = *(_OF_LANES,) * 3, *(_OF_PROMPT,) * 2, _SEGMENTS_OF_LANES, _SEGMENTS_OF_PROMPT


def _by_lane(x: Array) -> Array:
    """[P, L, T, heads, ...] as [P * L, heads, T, ...]."""
    return _heads_first(x.reshape(-1, *x.shape[2:]))


def _by_prompt(x: Array) -> Array:
    """[P, L, T, heads, ...] as [P, heads, L * T, ...]."""
    return _heads_first(x.reshape(x.shape[0], -1, *x.shape[3:]))


def _to_lanes(x: Array, like_PLT: Array) -> Array:
    """The inverse of both."""
    x = _heads_first(x)
    return x.reshape(*like_PLT.shape[:3], *x.shape[2:])


def _two_parts(interpret: bool, q, k, v, prefix_k, prefix_v, segment_PLT, there_PQ):
    """Each part, how it sees arrays of the queries, and its arguments."""
    own = _by_lane(q), _by_lane(k), _by_lane(v)
    segment_BT = segment_PLT.reshape(-1, segment_PLT.shape[2])
    prompt = _by_prompt(q), _heads_first(prefix_k), _heads_first(prefix_v)
    ones = jnp.ones((q.shape[0], q.shape[1] * q.shape[2]), jnp.int32)
    return (
        (_Part(True, interpret), _by_lane, (*own, segment_BT, segment_BT)),
        (_Part(False, interpret), _by_prompt, (*prompt, ones, there_PQ)),
    )


def _shared_prefix_forward(splash: Splash, *arrays: Array):
    def forward(q, *others):
        parts = _two_parts(splash.interpret, q, *others)
        found = [part.with_lse(*args) for part, _, args in parts]
        outs, lses = zip(*(tuple(_to_lanes(x, q) for x in pair) for pair in found))
        lse = jnp.logaddexp(*lses)
        weights = [jnp.exp(part - lse)[..., None] for part in lses]
        out = sum(w * part.astype(jnp.float32) for w, part in zip(weights, outs))
        return out.astype(q.dtype), lse

    out, lse = splash.by_device(forward, _AXES, (_OF_LANES, _OF_LANES[:-1]), *arrays)
    return out, (*arrays, out, lse)


def _shared_prefix_backward(splash: Splash, residuals, by_out: Array):
    def backward(*arrays_and_results):
        *arrays, out, lse, by_out = arrays_and_results
        (own, lanes, own_args), (prompt, rows, prompt_args) = _two_parts(splash.interpret, *arrays)
        by_own = own.gradients(*own_args, *map(lanes, (out, lse, by_out)))
        by_prompt = prompt.gradients(*prompt_args, *map(rows, (out, lse, by_out)))
        q = arrays[0]
        by_q = _to_lanes(by_own[0], q) + _to_lanes(by_prompt[0], q)
        return by_q, *(_to_lanes(x, q) for x in by_own[1:]), *map(_heads_first, by_prompt[1:])

    axes = *_AXES, _OF_LANES, _OF_LANES[:-1], _OF_LANES
    return *splash.by_device(backward, axes, _AXES[:5], *residuals, by_out), None, None


_shared_prefix.defvjp(_shared_prefix_forward, _shared_prefix_backward)
