"""int8 weights, keys and values, for sampling alone: decoding reads half or a quarter of the bytes.

Products take the codes themselves, and the scale multiplies the result (for attention's values, the
weights of the sum). So no second copy of a weight or of the cache is made.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.structs import Array, Params


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
    steps = x.astype(jnp.float32) / jnp.expand_dims(jnp.where(scale == 0, 1.0, scale), axis)
    return Int8(jnp.round(steps).astype(jnp.int8), scale)


# The axis that shares a scale, by a parameter's name: a dense layer has a scale per output, the
# embedding one per token (an output too if it is the head).
_SHARED = {"kernel": -2, "embedding": -1}


def weights(params: Params, dtype: Any) -> Params:
    """Parameters for sampling: kernels and embeddings in int8, norms and biases cast to `dtype`."""

    def one(path, x: Array) -> Array | Int8:
        axis = _SHARED.get(path[-1].key)
        return x.astype(dtype) if axis is None else int8(x, axis)

    return jax.tree_util.tree_map_with_path(one, params)


def weight_axes(axes: Params) -> Params:
    """The logical axes of the result of `weights`, from those of the parameters."""

    def one(path, names: tuple) -> tuple | Int8:
        axis = _SHARED.get(path[-1].key)
        if axis is None:
            return names
        kept = list(names)
        del kept[axis]
        return Int8(names, tuple(kept))

    return jax.tree_util.tree_map_with_path(one, axes, is_leaf=lambda x: isinstance(x, tuple))


def product(x: Array, kernel: Array | Int8, dtype: Any) -> Array:
    """`x` [..., in] times the kernel [in, out], multiplied in x's dtype, returned in `dtype`."""
    of_codes = isinstance(kernel, Int8)
    y = jnp.einsum(
        "...i,io->...o",
        x,
        (kernel.codes if of_codes else kernel).astype(x.dtype),
        preferred_element_type=jnp.float32 if of_codes else dtype,
    )
    return (y * _rows_of_one(kernel.scale, y.ndim)).astype(dtype) if of_codes else y


def _rows_of_one(scale: Array, ndim: int) -> Array:
    return scale.reshape((1,) * (ndim - scale.ndim) + scale.shape)
