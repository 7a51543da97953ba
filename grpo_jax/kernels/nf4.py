"""NF4 weights, which do not learn: 4 bits each, and a scale for each block of 64 (QLoRA).

Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), section 3. Blocks, levels and scales are those of
bitsandbytes. A block is 64 inputs of one output, counted in the matrix [out, in] row after row: if
the inputs are no multiple of 64, blocks run on into the next output. With double quantization the
scales are in 8 bits themselves.

The two weights of a byte are 32 inputs apart, not neighbours as in bitsandbytes' files. So decoding
joins two halves of a block, and neither interleaves nor transposes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.structs import Array

BLOCK = 64  # weights that share a scale
GROUP = 256  # scales that share a largest deviation

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0.
LEVELS = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


def _dynamic_levels() -> np.ndarray:
    """The 256 values of an 8-bit code with a dynamic exponent (arXiv:1511.04561), in order.

    Of magnitudes between 10^(i - 7) and 10^(i - 6) there are 2^i of each sign, for i up to 6.
    """
    found = [np.float32([0, 1])]
    for i in range(7):
        number, first = 2**i, np.float64(np.float32(0.1))
        step, at = np.float64(np.float32(0.9) / np.float32(number)), np.arange(2**i + 1)
        ends = np.where(at < (number + 1) // 2, first + step * at, 1 - step * (number - at))
        ends = ends.astype(np.float32)  # rounded once, as by torch.linspace
        means = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        found += [means, -means]
    return np.sort(np.concatenate(found))


SCALE_LEVELS = _dynamic_levels()


@struct.dataclass
class Scales:
    """Scales of blocks in 8 bits: a level times the largest of its group, plus the mean of all."""

    codes: Array  # uint8 [blocks, out]; groups count blocks output after output
    levels: Array  # float32 [256]: of each code
    largest: Array  # float32 [groups]: the largest deviation from the mean
    mean: Array  # float32


@struct.dataclass
class NF4:
    """A kernel [in, out] in NF4; leading axes stack layers.

    If blocks run on into the next output, all are one column: [blocks, 32, 1].
    """

    codes: Array  # uint8 [blocks, 32, out]: inputs i and i + 32 of a block, the first's bits high
    scale: Array | Scales  # float32 [blocks, out], or in 8 bits
    size: tuple[int, int] = struct.field(pytree_node=False)  # (in, out)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-3], *self.size)

    @property
    def is_by_output(self) -> bool:
        """Whether every block is of one output."""
        return self.size[0] % BLOCK == 0


# --- Decoding -------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """What decoding takes besides codes and scales."""

    levels: Array = LEVELS
    numbers: Array = np.arange(256, dtype=np.uint8)  # of codes of scales
    zero: Array = np.float32(0)


def decode(kernel: NF4, dtype: Any, tables: Tables = Tables()) -> Array:  # noqa: B008
    """The kernel that the codes stand for: products in float32, rounded to `dtype`.

    `tables`: in a loop over layers, as values that XLA does not know: of constants it makes arrays
    as large as the kernel, one for each level, and keeps them for the whole loop (libtpu 0.0.42).
    """
    halves = jnp.concatenate([kernel.codes >> 4, kernel.codes & 15], axis=-2)
    values = level(halves, tables.levels) * jnp.expand_dims(scales(kernel, tables), -2)
    values = values.astype(dtype)
    inputs, outputs = kernel.size
    if kernel.is_by_output:
        return values.reshape(kernel.shape)
    stack = kernel.shape[:-2]
    rows = values.reshape(*stack, -1)[..., : inputs * outputs]
    return rows.reshape(*stack, outputs, inputs).swapaxes(-1, -2)


def level(codes: Array, levels: Array = LEVELS) -> Array:
    """The level of each code: 15 choices by bits, since a lookup is slow on TPUs."""
    values: list[Any] = list(levels)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]


def scales(kernel: NF4, tables: Tables = Tables()) -> Array:  # noqa: B008
    """Scales of the blocks, float32 [blocks, out]."""
    scale = kernel.scale
    if not isinstance(scale, Scales):
        return scale
    *stack, blocks, outputs = scale.codes.shape
    level = jax.lax.platform_dependent(
        scale.codes, scale.levels, tables, tpu=_looked_up_by_sums, default=_looked_up
    )
    largest = jnp.broadcast_to(scale.largest[..., None], (*scale.largest.shape, GROUP))
    largest = largest.reshape(*stack, -1)[..., : blocks * outputs]
    largest = largest.reshape(*stack, outputs, blocks).swapaxes(-1, -2)
    return level * largest + scale.mean[..., None, None]


def with_plain_scales(kernel: NF4) -> NF4:
    """The kernel with its scales in float32."""
    return kernel.replace(scale=scales(kernel))


def _looked_up(codes: Array, levels: Array, tables: Tables) -> Array:
    """Levels [..., 256] of codes [..., blocks, out]."""
    flat = jnp.take_along_axis(levels, codes.reshape(*levels.shape[:-1], -1), -1)
    return flat.reshape(codes.shape)


def _looked_up_by_sums(codes: Array, levels: Array, tables: Tables) -> Array:
    """The same where a lookup is slow; other compilers would make an array 256 times as large."""
    number = tables.numbers.reshape((1,) * codes.ndim + (-1,))
    own = jnp.where(codes[..., None] == number, levels[..., None, None, :], tables.zero)
    return own.sum(-1)


# --- Quantizing -----------------------------------------------------------------------------------


def quantize(
    kernel: Array, *, double: bool = True, whole: Callable[[Array], Array] = lambda x: x
) -> NF4:
    """A kernel [in, out] in NF4: each weight has the code of the nearest level, as a share of its
    block's largest magnitude.

    `double`: the scales are in 8 bits. `whole` puts them on every device, so that their mean is of
    the same order on every mesh.
    """
    size = kernel.shape
    values = kernel.astype(jnp.float32)
    if size[0] % BLOCK == 0:
        values = values.reshape(-1, BLOCK, size[1])
    else:
        flat = values.T.reshape(-1)
        values = jnp.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK, 1)
    scale = jnp.abs(values).max(axis=1)
    shares = values * (1 / jnp.where(scale == 0, 1.0, scale))[:, None]
    codes = sum((shares > middle).astype(jnp.uint8) for middle in _middles(LEVELS))
    packed = codes[:, : BLOCK // 2] << 4 | codes[:, BLOCK // 2 :]
    return NF4(packed, _in_8_bits(whole(scale)) if double else scale, size)


def _middles(levels: np.ndarray) -> np.ndarray:
    """The middles between levels; a value on one has the lower level."""
    return (levels[:-1] + levels[1:]) / np.float32(2)


def _in_8_bits(scale: Array) -> Scales:
    """Scales [blocks, out] by their nearest levels; every group's largest deviation is kept."""
    blocks, outputs = scale.shape
    mean, flat = scale.mean(), scale.T.reshape(-1)
    groups = jnp.pad(flat - mean, (0, -len(flat) % GROUP)).reshape(-1, GROUP)
    largest = jnp.abs(groups).max(axis=1)
    shares = groups * (1 / jnp.where(largest == 0, 1.0, largest))[:, None]
    codes = jnp.searchsorted(_middles(SCALE_LEVELS), shares).astype(jnp.uint8)
    codes = codes.reshape(-1)[: len(flat)].reshape(outputs, blocks).T
    return Scales(codes, jnp.asarray(SCALE_LEVELS), largest, mean)


# --- In a tree ------------------------------------------------------------------------------------


def alike(kernels: Sequence[NF4]) -> list[Any]:
    """Kernels [in, out] of the same inputs, such that their arrays can be joined by output.

    Their scales are float32: groups of scales need not end where a kernel ends. If blocks run on
    over outputs, the kernels are decoded.
    """
    if not all(kernel.is_by_output for kernel in kernels):
        return [decode(kernel, jnp.float32) for kernel in kernels]
    size = kernels[0].size[0], sum(kernel.size[1] for kernel in kernels)
    return [NF4(kernel.codes, scales(kernel), size) for kernel in kernels]


def axes_of(kernel: NF4, names: tuple) -> NF4:
    """The logical axes of its arrays from those of the kernel, (*stack, in, out).

    Blocks are split, never what is in one. Those that run on over outputs are not split.
    """
    *stack, inputs, outputs = names if kernel.is_by_output else (*names[:-2], None, None)
    scale: Any = (*stack, inputs, outputs)
    if isinstance(kernel.scale, Scales):
        scale = Scales(scale, (*stack, None), (*stack, None), tuple(stack))
    return NF4((*stack, inputs, None, outputs), scale, kernel.size)
