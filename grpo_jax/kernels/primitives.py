"""Selections and lookups of arrays, in the few operations that they need.

What `jax.numpy` has for them is a program of its own inside the program that calls it, and allows
for negative and absent places. Tracing and compiling one takes several times as long, and a start
has hundreds. The values are the same.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_IN_RANGE = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def where(condition: Array, x: Array | float, y: Array | float) -> Array:
    """`x` where the condition is True, else `y`, as `jnp.where`; all three are broadcast."""
    dtype = jnp.result_type(x, y)
    shape = np.broadcast_shapes(np.shape(condition), np.shape(x), np.shape(y))
    if np.ndim(condition):  # else XLA selects by one bool
        condition = _broadcast(condition, shape)
    return lax.select(condition, *(_broadcast(v, shape, dtype) for v in (x, y)))


def _broadcast(x: Array | float, shape: tuple[int, ...], dtype=None) -> Array:
    if isinstance(x, (int, float)):
        return lax.full(shape, x, dtype)
    x = x if dtype is None else lax.convert_element_type(x, dtype)
    if np.shape(x) == shape:
        return x if isinstance(x, jnp.ndarray) else jnp.asarray(x)
    return lax.broadcast_in_dim(x, shape, range(len(shape) - np.ndim(x), len(shape)))


def take_along(x: Array, index: Array) -> Array:
    """Values [..., Y] at places [..., Y] of the last axis of `x` [..., X]; each place is in range.

    All other axes are equal. As `jnp.take_along_axis`.
    """
    lead = tuple(range(x.ndim - 1))
    how = lax.GatherDimensionNumbers((), (x.ndim - 1,), (x.ndim - 1,), lead, lead)
    return lax.gather(x, index[..., None], how, (1,) * x.ndim, mode=_IN_RANGE)


def rows(x: Array, index: Array) -> Array:
    """Rows `x[index]` of the first axis, index [...]; each place is in range."""
    kept = tuple(range(index.ndim, index.ndim + x.ndim - 1))
    how = lax.GatherDimensionNumbers(kept, (0,), (0,))
    return lax.gather(x, index[..., None], how, (1, *x.shape[1:]), mode=_IN_RANGE)


def rows_of_each(x: Array, index: Array) -> Array:
    """Rows `x[b, index[b]]` of each b, for `x` [B, N, ...] and index [B, ...] in range."""
    kept = tuple(range(index.ndim, index.ndim + x.ndim - 2))
    how = lax.GatherDimensionNumbers(kept, (1,), (1,), (0,), (0,))
    return lax.gather(x, index[..., None], how, (1, 1, *x.shape[2:]), mode=_IN_RANGE)


def nth(x: Array, n: Array) -> Array:
    """`x[n]` of the first axis, for one place in range."""
    return lax.dynamic_index_in_dim(x, n, keepdims=False, allow_negative_indices=False)


def split_index(place: Array, size: int) -> tuple[Array, Array]:
    """Quotient and remainder of places, none of them negative, by the size of an axis."""
    size = lax.full_like(place, size)
    return lax.div(place, size), lax.rem(place, size)
