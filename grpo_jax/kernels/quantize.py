"""int8 weights, keys and values, which do not learn: half or a quarter of the bytes are read.

Products take the codes themselves, and the scale multiplies the result (for attention's values, the
weights of the sum). So no second copy of a weight or of the cache is made. Kernels in NF4
(`nf4.py`) are decoded for each product, forward and backward, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.kernels import nf4
from grpo_jax.kernels.nf4 import NF4
from grpo_jax.kernels.primitives import where
from grpo_jax.structs import Array


@struct.dataclass
class Int8:
    """An array in int8: codes times their scale."""

    codes: Array  # int8, -127 to 127
    scale: Array  # float32, in the shape of the codes without the axis that shares a scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def T(self) -> Int8:  # noqa: N802
        """The transpose of a matrix; each scale stays with its row or column."""
        return Int8(self.codes.T, self.scale)


def int8(x: Array, axis: int) -> Int8:
    """`x` rounded to 255 equal steps between plus and minus its largest magnitude along `axis`."""
    scale = jnp.abs(x).max(axis=axis).astype(jnp.float32) / 127
    steps = x.astype(jnp.float32) / jnp.expand_dims(where(scale == 0, 1.0, scale), axis)
    return Int8(jnp.round(steps).astype(jnp.int8), scale)


def product(x: Array, kernel: Array | Int8 | NF4, dtype: Any) -> Array:
    """`x` [..., in] times the kernel [in, out], multiplied in x's dtype, as `dtype`."""
    if isinstance(kernel, (Int8, NF4)):
        return frozen_product(x, kernel).astype(dtype)
    return jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype), preferred_element_type=dtype)


def frozen_product(x: Array, kernel: Array | Int8 | NF4) -> Array:
    """`x` [..., in] times a kernel [in, out] that has no gradient, in float32."""
    if isinstance(kernel, Int8):
        y = _frozen_product(x, kernel.codes)
        return y * _rows_of_one(kernel.scale, y.ndim)
    return _frozen_product(x, kernel)


FrozenProduct = Callable[[Array, "Array | Int8 | NF4"], Array]  # as `frozen_product`


@jax.custom_vjp
def _frozen_product(x: Array, kernel: Array | NF4) -> Array:
    x, kernel = _beside(x, kernel)
    return jnp.einsum("...i,io->...o", x, kernel, preferred_element_type=jnp.float32)


def _backward(residuals: tuple[Array, Array | NF4], grad: Array) -> tuple[Array, None]:
    like, kernel = residuals
    # In x's dtype: of float32 and bfloat16 XLA would make a product in float32.
    grad, kernel = _beside(grad.astype(like.dtype), kernel)
    return jnp.einsum("...o,io->...i", grad, kernel), None


def _beside(x: Array, kernel: Array | NF4) -> tuple[Array, Array]:
    """`x`, and the kernel in x's dtype."""
    if not isinstance(kernel, NF4):
        return x, kernel.astype(x.dtype)
    # Decoded when x is there, lest XLA do so before a loop over tokens, or keep the decoded kernel
    # from the forward to the backward pass. XLA for CPUs drops this barrier early, and does both.
    tables = jax.tree.map(jnp.asarray, nf4.Tables())
    x, kernel, tables = jax.lax.optimization_barrier((x, kernel, tables))
    return x, nf4.decode(kernel, x.dtype, tables)


_frozen_product.defvjp(
    lambda x, kernel: (_frozen_product(x, kernel), (jnp.zeros((), x.dtype), kernel)), _backward
)


def _rows_of_one(scale: Array, ndim: int) -> Array:
    return scale.reshape((1,) * (ndim - scale.ndim) + scale.shape)
