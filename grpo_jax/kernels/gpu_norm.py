"""The residual stream's sum and its RMS norm in one kernel, for decoding on NVIDIA GPUs.

Plain XLA uses one kernel for the sums and one for the products. A decode step has so few rows that
a kernel takes longer to launch than to run. Written in Pallas for Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from grpo_jax.kernels import pallas_triton
from grpo_jax.kernels.norm import Residual
from grpo_jax.structs import Array

_WARPS = 4  # of a program


class FusedNorm(nn.Module):
    """As `norm.AddNorm`, in one kernel; only for a forward pass."""

    epsilon: float
    dtype: Any
    scale_init: Any = nn.initializers.ones
    offset: float = 0.0  # added to the scale
    interpret: bool = False  # runs on any device, for tests

    @nn.compact
    def __call__(self, x: Residual) -> tuple[Array, Array]:
        parts = [y.reshape(-1, y.shape[-1]) for y in x]
        shape, (rows, width) = x.states.shape, parts[0].shape
        scale_D = self.param("scale", self.scale_init, (width,))
        padded = pl.next_power_of_2(width)
        row, whole = pl.BlockSpec((None, padded), lambda i: (i, 0)), lambda i: (0,)
        total, normed = pl.pallas_call(
            functools.partial(_kernel, width=width, epsilon=self.epsilon, offset=self.offset),
            grid=(rows,),
            in_specs=[pl.BlockSpec((padded,), whole), row, row],
            out_specs=[row, row],
            out_shape=[
                jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (parts[0].dtype, self.dtype)
            ],
            name="norm",
            **pallas_triton.options(self.interpret, num_warps=_WARPS),
        )(scale_D, *parts)
        return total.reshape(shape), normed.reshape(shape)


def _kernel(
    scale_ref,
    states_ref,
    branch_ref,
    sum_ref,
    out_ref,
    *,
    width: int,
    epsilon: float,
    offset: float,
):
    gpu = pallas_triton.module()
    there_D = jnp.arange(scale_ref.shape[0]) < width
    read = lambda ref: gpu.load(ref, mask=there_D, other=0.0)  # noqa: E731
    x_D = read(states_ref) + read(branch_ref)
    gpu.store(sum_ref, x_D, mask=there_D)
    x_D = x_D.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x_D * x_D) / width + epsilon)
    factor_D = read(scale_ref).astype(jnp.float32)
    y_D = x_D * (scale * (factor_D + offset if offset else factor_D))
    gpu.store(out_ref, y_D.astype(out_ref.dtype), mask=there_D)
