"""Products of few rows with kernels in 8 or 4 bits, for decoding on NVIDIA GPUs.

Plain XLA writes a decoded NF4 kernel to memory and reads it again: more bytes than a plain kernel
has. Here each program decodes its part of a kernel in registers. The inputs are split over programs
too, since one output's columns alone do not fill the device. Written in Pallas for Triton.

    B rows    I inputs, K of a step    O outputs, N of a program    S parts of the inputs
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    programs: int = 1056  # about as many, by parts of the inputs
    sums: float = 2.0**24  # bytes of all parts' sums, about: they stay in the cache
    warps: int = 4
    stages: int = 4


@dataclasses.dataclass(frozen=True)
class FewRows:
    """As `quantize.frozen_product`, with programs of its own for few rows; for a forward pass."""

    most_rows: int = 128
    least_int8: int = 2**25  # weights of a kernel; smaller ones in int8 are left to XLA
    tile: Tile = Tile()
    interpret: bool = False  # runs on any device, for tests

    def __call__(self, x: Array, kernel: Array | Int8 | NF4) -> Array:
        x_BI = x.reshape(-1, x.shape[-1])
        if not self._suits(kernel) or len(x_BI) > self.most_rows:
            return quantize.frozen_product(x, kernel)
        y_BO = product(x_BI, kernel, self.tile, interpret=self.interpret)
        if y_BO is None:
            return quantize.frozen_product(x, kernel)
        return y_BO.reshape(*x.shape[:-1], -1)

    def _suits(self, kernel: Array | Int8 | NF4) -> bool:
        if isinstance(kernel, Int8):
            return math.prod(kernel.shape) >= self.least_int8
        return isinstance(kernel, NF4)


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
    padded = max(16, pl.next_power_of_2(rows))
    wanted = min(tile.programs * tile.outputs, tile.sums / (4 * padded)) / outputs
    parts = _parts(steps, wanted)
    x_BI = jnp.pad(x_BI, ((0, padded - rows), (0, 0)))
    sizes = {"steps": steps // parts, "blocks": tile.blocks}
    if isinstance(kernel, NF4):
        # Halves of blocks beside each other, as codes hold them.
        x = x_BI.reshape(padded, number, 2, _HALF)
        halves = (x[:, :, half].reshape(padded, inputs // 2) for half in (0, 1))
        codes = kernel.codes.reshape(number * _HALF, outputs)
        arrays = *halves, codes, kernel.scale
        both = _levels_by_choice if interpret else _levels_by_bytes
        body = functools.partial(_nf4_kernel, **sizes, levels=both)
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
    return y_BO if isinstance(kernel, NF4) else y_BO * kernel.scale[None]


def _parts(steps: int, wanted: float) -> int:
    """A number of equal parts of the steps, at most half above the wanted one.

    A part has four steps or more, since each writes its sums.
    """
    most = max(1, min(1.5 * wanted, steps / 4))
    return max(n for n in range(1, steps + 1) if steps % n == 0 and n <= most)


def _whole(ndim: int, *program: Any) -> tuple[int, ...]:
    return (0,) * ndim


def _nf4_kernel(high_ref, low_ref, codes_ref, scale_ref, out_ref, *, steps, blocks, levels):
    gpu = pallas_triton.module()
    rows, outputs = out_ref.shape
    columns, part = pl.ds(pl.program_id(0) * outputs, outputs), pl.program_id(1)

    def step(i, sum_BN):
        first = (part * steps + i) * blocks
        inputs = pl.ds(first * _HALF, blocks * _HALF)
        codes_KN = gpu.load(codes_ref.at[inputs, columns])
        scale_KN = gpu.load(scale_ref.at[pl.ds(first, blocks), columns])
        scale_KN = jnp.broadcast_to(scale_KN[:, None], (blocks, _HALF, outputs))
        scale_KN = scale_KN.reshape(blocks * _HALF, outputs)
        for x_ref, level_KN in zip((high_ref, low_ref), levels(codes_KN)):
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


# --- Levels of NF4 --------------------------------------------------------------------------------


def _levels_by_choice(codes: Array) -> tuple[Array, Array]:
    """The levels of the high and the low bits of bytes, float32."""
    return nf4.level(codes >> 4), nf4.level(codes & 15)


def _levels_by_bytes(codes: Array) -> tuple[Array, Array]:
    """The same for NVIDIA GPUs, four bytes at a time: `prmt` looks four bytes up at once.

    15 choices for each weight would take longer than a plain kernel takes to be read.
    """
    level, look_up = jax.ShapeDtypeStruct(codes.shape, jnp.float32), pallas_triton.module()
    high, low = (
        look_up.elementwise_inline_asm(
            assembly(shift),
            args=[codes],
            constraints="=r,=r,=r,=r,r",
            pack=4,
            result_shape_dtypes=[level],
        )[0]
        for shift in (4, 0)
    )
    return high, low


@functools.cache
def assembly(shift: int) -> str:
    """PTX from four bytes, $4, to the float32 levels $0 to $3 of four of their bits from `shift`.

    `prmt.b32 d, a, b, s`: byte i of d is the byte of a (0 to 3) or b (4 to 7) that bits 4 i to
    4 i + 2 of s name. So two of them and a choice between both look up one byte of four levels.
    """
    planes = np.ascontiguousarray(nf4.LEVELS.view(np.uint8).reshape(16, 4).T)  # by byte of a level
    lines = [
        ".reg .b32 n, s, t, u, v, p0, p1, p2, p3;",
        f"shr.b32 n, $4, {shift};",
        "and.b32 n, n, 0x0F0F0F0F;",
        "shr.b32 t, n, 4;",
        "or.b32 n, n, t;",
        "prmt.b32 s, n, 0, 0x4420;",  # the four codes beside each other
        "and.b32 t, s, 0x8888;",
        "shr.b32 t, t, 1;",
        "or.b32 t, t, 0x3210;",  # whether each is above 7
        "and.b32 s, s, 0x7777;",
    ]
    for plane, row in enumerate(planes):
        a, b, c, d = row.view(np.uint32)
        lines += [
            f"prmt.b32 u, {a:#x}, {b:#x}, s;",
            f"prmt.b32 v, {c:#x}, {d:#x}, s;",
            f"prmt.b32 p{plane}, u, v, t;",
        ]
    lines += [
        "prmt.b32 u, p0, p1, 0x5140;",
        "prmt.b32 v, p2, p3, 0x5140;",
        "prmt.b32 $0, u, v, 0x5410;",
        "prmt.b32 $1, u, v, 0x7632;",
        "prmt.b32 u, p0, p1, 0x7362;",
        "prmt.b32 v, p2, p3, 0x7362;",
        "prmt.b32 $2, u, v, 0x5410;",
        "prmt.b32 $3, u, v, 0x7632;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"
