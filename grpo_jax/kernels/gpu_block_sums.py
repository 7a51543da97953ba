"""`block_sums` for NVIDIA GPUs: a kernel that reads each score once.

Plain XLA reads a vocabulary's scores twice: for their maximum, then for the sums of exponentials.
Here each block subtracts its own maximum, so one pass suffices. N are blocks of the vocabulary, W
the tokens of one. Written in Pallas for Triton.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from grpo_jax.kernels import pallas_triton
from grpo_jax.structs import Array

_SCORES, _WARPS = 8192, 4  # of a program: the most scores, and its warps
_LEAST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class TritonBlockSums:
    """As `block_sums.sums_of_blocks`."""

    interpret: bool = False  # runs on any device, for tests

    def __call__(self, blocks_BNW: Array, temperature: Array | float) -> tuple[Array, Array]:
        rows, number, width = blocks_BNW.shape
        columns = pl.next_power_of_2(width)
        together = min(max(1, _SCORES // columns), pl.next_power_of_2(number))
        out = pl.BlockSpec((None, together), lambda b, n: (b, n))
        mass_BN, peak_BN = pl.pallas_call(
            functools.partial(_kernel, number=number, width=width),
            grid=(rows, pl.cdiv(number, together)),
            in_specs=[
                pl.BlockSpec((1,), lambda b, n: (0,)),
                pl.BlockSpec((None, together, columns), lambda b, n: (b, n, 0)),
            ],
            out_specs=[out, out],
            out_shape=[jax.ShapeDtypeStruct((rows, number), jnp.float32)] * 2,
            name="sums_of_blocks",
            **pallas_triton.options(self.interpret, num_warps=_WARPS),
        )(jnp.asarray(temperature, jnp.float32).reshape(1), blocks_BNW)
        peak_B1 = peak_BN.max(-1, keepdims=True)
        return mass_BN * jnp.exp(peak_BN - peak_B1), peak_B1


def _kernel(temperature_ref, score_ref, mass_ref, peak_ref, *, number: int, width: int):
    gpu = pallas_triton.module()
    together, columns = score_ref.shape
    there_N = pl.program_id(1) * together + jnp.arange(together) < number
    there_NW = there_N[:, None] & (jnp.arange(columns) < width)[None]
    score_NW = gpu.load(score_ref, mask=there_NW, other=-jnp.inf) / temperature_ref[0]
    # inf - inf is NaN, so a block without a possible token has the peak `_LEAST`.
    peak_N = jnp.maximum(jnp.max(score_NW, axis=1), _LEAST)
    mass_N = jnp.sum(jnp.exp(score_NW - peak_N[:, None]), axis=1)
    gpu.store(mass_ref, mass_N, mask=there_N)
    gpu.store(peak_ref, peak_N, mask=there_N)
