"""Rotary position embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from grpo_jax.structs import Array


def rotary(position: Array, inv_freq: Array, amplitude: Array | None = None) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, float32 [..., H/2], for positions [...].

    `amplitude` [H/2]: what both are multiplied by; None: 1.
    """
    shape, axes = (*position.shape, len(inv_freq)), range(position.ndim)
    position = lax.broadcast_in_dim(position.astype(jnp.float32), shape, axes)
    angle = position * lax.broadcast_in_dim(inv_freq, shape, (len(axes),))
    cos_sin = jnp.cos(angle), jnp.sin(angle)
    if amplitude is None:
        return cos_sin
    amplitude = jnp.asarray(amplitude).reshape((1,) * (angle.ndim - 1) + (-1,))
    return cos_sin[0] * amplitude, cos_sin[1] * amplitude


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Heads [..., heads, H] rotated by their rotary angles (Su et al. 2021, arXiv:2104.09864).

    Pairs are (i, i + H/2), as in Hugging Face checkpoints.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    axes = (*range(x.ndim - 2), x.ndim - 1)
    cos, sin = (lax.broadcast_in_dim(t, first.shape, axes) for t in cos_sin)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
