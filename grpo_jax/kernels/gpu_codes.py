"""Products of few rows with kernels in 8 or 4 bits, for decoding on NVIDIA GPUs.

Plain XLA writes a decoded NF4 kernel to memory and reads it again: more bytes than a plain kernel
has. Here each program decodes its part of a kernel in registers. The inputs are split over programs
too, since one output's columns alone do not fill the device. Written in Pallas for Triton.

    B rows   I inputs   O outputs   S parts of the inputs   K inputs of a step   N outputs of a program
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from grpo_jax.kernels import nf4, pallas_triton, quantize
from grpo_jax.kernels.nf4 import BLOCK, NF4
from grpo_jax.kernels.quantize import Int8
from grpo_jax.structs import Array

_HALF = BLOCK // 2


@dataclasses.dataclass(frozen=True)
class Tile:
    """The sizes of a program, and how many there are."""

    outputs: int = 128
    blocks: int = 1  # of NF4, or of 64 inputs, in a step
    programs: int = 1024  # at least as many, by parts of the inputs
    warps: int = 4
    stages: int = 4
    choices: bool = False  # levels by choices, not by a lookup


@dataclasses.dataclass(frozen=True)
class FewRows:
    """As `quantize.frozen_product`, with programs of its own for few rows; for a forward pass."""

    most_rows: int = 128
    tile: Tile = Tile()
    interpret: bool = False  # runs on any device, for tests

    def __call__(self, x: Array, kernel: Array | Int8 | NF4) -> Array:
        x_BI = x.reshape(-1, x.shape[-1])
        if not isinstance(kernel, (Int8, NF4)) or len(x_BI) > self.most_rows:
            return quantize.frozen_product(x, kernel)
        y_BO = product(x_BI, kernel, self.tile, interpret=self.interpret)
        if y_BO is None:
            return quantize.frozen_product(x, kernel)
        return y_BO.reshape(*x.shape[:-1], -1)


def product(
    x_BI: Array, kernel: Int8 | NF4, tile: Tile = Tile(), *, interpret: bool = False
) -> Array | None:
    """`x` times a kernel in codes, float32 [B, O]; None if its sizes do not suit the programs.

    The scales of NF4 are float32.
    """
    rows, (inputs, outputs) = x_BI.shape[0], kernel.shape
    number = inputs // BLOCK
    if inputs % BLOCK or outputs % tile.outputs or number % tile.blocks:
        return None
    steps = number // tile.blocks
    parts = _parts(steps, tile.programs * tile.outputs / outputs)
    padded = max(16, pl.next_power_of_2(rows))
    x_BI = jnp.pad(x_BI, ((0, padded - rows), (0, 0)))
    sizes = {"steps": steps // parts, "blocks": tile.blocks}
    if isinstance(kernel, NF4):
        # Halves of blocks beside each other, as codes hold them.
        x = x_BI.reshape(padded, number, 2, _HALF)
        halves = (x[:, :, half].reshape(padded, inputs // 2) for half in (0, 1))
        codes = kernel.codes.reshape(number * _HALF, outputs)
        arrays = jnp.asarray(nf4.LEVELS), *halves, codes, kernel.scale
        body = functools.partial(_nf4_kernel, **sizes, choices=tile.choices)
    else:
        arrays, body = (x_BI, kernel.codes), functools.partial(_int8_kernel, **sizes)
    out_SBO = pl.pallas_call(
        body,
        grid=(outputs // tile.outputs, parts),
        in_specs=[pl.BlockSpec(a.shape, functools.partial(_whole, a.ndim)) for a in arrays],
        out_specs=pl.BlockSpec((None, padded, tile.outputs), lambda n, s: (s, 0, n)),
        out_shape=jax.ShapeDtypeStruct((parts, padded, outputs), jnp.float32),
        name="product_of_codes",
        **pallas_triton.options(interpret, num_warps=tile.warps, num_stages=tile.stages),
    )(*arrays)
    y_BO = out_SBO.sum(0)[:rows]
    return y_BO if isinstance(kernel, NF4) else y_BO * kernel.scale


def _parts(steps: int, wanted: float) -> int:
    """The fewest equal parts of the steps that are at least as many as wanted, or all."""
    return next((n for n in range(1, steps + 1) if steps % n == 0 and n >= wanted), steps)


def _whole(ndim: int, *program: Any) -> tuple[int, ...]:
    return (0,) * ndim


def _nf4_kernel(
    levels_ref, high_ref, low_ref, codes_ref, scale_ref, out_ref, *, steps, blocks, choices
):
    gpu = pallas_triton.module()
    rows, outputs = out_ref.shape
    columns, part = pl.ds(pl.program_id(0) * outputs, outputs), pl.program_id(1)

    def step(i, sum_BN):
        first = (part * steps + i) * blocks
        inputs = pl.ds(first * _HALF, blocks * _HALF)
        codes_KN = gpu.load(codes_ref.at[inputs, columns]).astype(jnp.int32)
        scale_KN = gpu.load(scale_ref.at[pl.ds(first, blocks), columns])
        scale_KN = jnp.broadcast_to(scale_KN[:, None], (blocks, _HALF, outputs))
        scale_KN = scale_KN.reshape(blocks * _HALF, outputs)
        for x_ref, code_KN in ((high_ref, codes_KN >> 4), (low_ref, codes_KN & 15)):
            level_KN = nf4.level(code_KN) if choices else gpu.load(levels_ref.at[code_KN])
            x_BK = gpu.load(x_ref.at[:, inputs])
            weight_KN = (level_KN * scale_KN).astype(x_BK.dtype)
            sum_BN += _dot(x_BK, weight_KN)
        return sum_BN

    sum_BN = jnp.zeros((rows, outputs), jnp.float32)
    gpu.store(out_ref, jax.lax.fori_loop(0, steps, step, sum_BN))


def _int8_kernel(x_ref, codes_ref, out_ref, *, steps, blocks):
    gpu = pallas_triton.module()
    rows, outputs = out_ref.shape
    columns, part = pl.ds(pl.program_id(0) * outputs, outputs), pl.program_id(1)
    more = blocks * BLOCK

    def step(i, sum_BN):
        inputs = pl.ds((part * steps + i) * more, more)
        x_BK = gpu.load(x_ref.at[:, inputs])
        code_KN = gpu.load(codes_ref.at[inputs, columns])
        return sum_BN + _dot(x_BK, code_KN.astype(x_BK.dtype))

    sum_BN = jnp.zeros((rows, outputs), jnp.float32)
    gpu.store(out_ref, jax.lax.fori_loop(0, steps, step, sum_BN))


def _dot(x_BK: Array, y_KN: Array) -> Array:
    return jnp.dot(x_BK, y_KN, preferred_element_type=jnp.float32)
