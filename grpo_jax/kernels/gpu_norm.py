"""RMS norms of few rows on NVIDIA GPUs, by a kernel that also adds what a layer has found.

Plain XLA has one kernel for the sums and one for the products, and of the few rows of a token a
kernel takes longer to start than to run. Written in Pallas for Triton.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from grpo_jax.kernels import pallas_triton
from grpo_jax.structs import Array

_WARPS = 4  # of a program: groups of 32 threads


class Sum(NamedTuple):
    """States [..., D] that stand for their sum."""

    states: Array
    more: Array


class FusedNorm(nn.Module):
    """As `nn.RMSNorm`, of states [..., D] or of a `Sum` of such; for a forward pass alone.

    Of a sum it is returned too, in a tuple with its norm.
    """

    epsilon: float
    dtype: Any
    scale_init: Any = nn.initializers.ones
    interpret: bool = False  # anywhere, for a test

    @nn.compact
    def __call__(self, x: Array | Sum) -> Array | tuple[Array, Array]:
        parts = [y.reshape(-1, y.shape[-1]) for y in (x if isinstance(x, Sum) else (x,))]
        shape, (rows, width) = (x.states if isinstance(x, Sum) else x).shape, parts[0].shape
        scale_D = self.param("scale", self.scale_init, (width,))
        padded = pl.next_power_of_2(width)
        row, whole = pl.BlockSpec((None, padded), lambda i: (i, 0)), lambda i: (0,)
        outs = [self.dtype] if len(parts) == 1 else [parts[0].dtype, self.dtype]
        found = pl.pallas_call(
            functools.partial(_kernel, width=width, epsilon=self.epsilon),
            grid=(rows,),
            in_specs=[pl.BlockSpec((padded,), whole), *[row] * len(parts)],
            out_specs=[row] * len(outs),
            out_shape=[jax.ShapeDtypeStruct((rows, width), dtype) for dtype in outs],
            name="norm",
            **pallas_triton.options(self.interpret, num_warps=_WARPS),
        )(scale_D, *parts)
        found = tuple(y.reshape(shape) for y in found)
        return found if isinstance(x, Sum) else found[0]


def _kernel(scale_ref, *refs, width: int, epsilon: float):
    gpu = pallas_triton.module()
    there_D = jnp.arange(scale_ref.shape[0]) < width
    read = lambda ref: gpu.load(ref, mask=there_D, other=0.0)  # noqa: E731
    if len(refs) == 2:
        x_ref, out_ref = refs
        x_D = read(x_ref)
    else:
        x_ref, more_ref, sum_ref, out_ref = refs
        x_D = read(x_ref) + read(more_ref)
        gpu.store(sum_ref, x_D, mask=there_D)
    x_D = x_D.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x_D * x_D) / width + epsilon)
    y_D = x_D * (scale * read(scale_ref).astype(jnp.float32))
    gpu.store(out_ref, y_D.astype(out_ref.dtype), mask=there_D)
