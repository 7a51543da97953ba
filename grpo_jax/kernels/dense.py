"""The kernel of a dense layer: plain, in 8 bits (`quantize.py`) or 4 (`nf4.py`), or adapted.

With an adapter a layer computes x W + ((x A) scaling) B (Hu et al. 2021, "LoRA", arXiv:2106.09685).
The two products are never merged into W here: where W is in few bits, most of a small change would
be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from grpo_jax.kernels import nf4, quantize
from grpo_jax.kernels.nf4 import NF4
from grpo_jax.kernels.quantize import FrozenProduct, Int8
from grpo_jax.structs import Array, Params

# The name of a layer's product, for the backward pass to keep: with an adapter the sum of two.
KEPT = "dense"

# The axis that shares a scale, by a parameter's name: each output of a dense layer has its own, and
# each token of the embedding, which is an output where it is the head too.
_SHARED = {"kernel": -2, "embedding": -1}
_UNCAST = ("scaling",)


@struct.dataclass
class Adapted:
    """A kernel and the low-rank product that is added to it; leading axes stack layers."""

    kernel: Array | Int8 | NF4  # [in, out]
    a: Array  # [in, r]
    b: Array  # [r, out]
    scaling: Array  # float32 [r]; 0 where the layer has a lower rank than others of its stack

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape


def product(
    x: Array,
    kernel: Array | Int8 | NF4 | Adapted,
    dtype: Any,
    frozen_product: FrozenProduct = quantize.frozen_product,
) -> Array:
    """`x` [..., in] times the kernel [in, out], multiplied in x's dtype, as `dtype`.

    `frozen_product` multiplies kernels in codes and those beside an adapter.
    """
    if in_codes(kernel):
        return checkpoint_name(frozen_product(x, kernel).astype(dtype), KEPT)
    if not isinstance(kernel, Adapted):
        return checkpoint_name(quantize.product(x, kernel, dtype), KEPT)
    low = jnp.einsum("...i,ir->...r", x, kernel.a.astype(x.dtype))
    scaling = kernel.scaling.reshape((1,) * (low.ndim - 1) + (-1,))
    low = (low * scaling).astype(x.dtype)
    y = frozen_product(x, kernel.kernel)
    y += jnp.einsum("...r,ro->...o", low, kernel.b.astype(x.dtype)).astype(jnp.float32)
    return checkpoint_name(y.astype(dtype), KEPT)  # rounded once, as without an adapter


def plain(kernel: Array | Int8 | NF4 | Adapted) -> Array:
    """The array that a kernel stands for; float32 where it is in codes or has an adapter."""
    if isinstance(kernel, NF4):
        return nf4.decode(kernel, jnp.float32)
    if isinstance(kernel, Int8):
        return kernel.codes * jnp.expand_dims(kernel.scale, -2)
    if not isinstance(kernel, Adapted):
        return kernel
    a = kernel.a.astype(jnp.float32) * jnp.expand_dims(kernel.scaling, -2)
    low = jnp.matmul(a, kernel.b.astype(jnp.float32), precision="highest")
    return plain(kernel.kernel).astype(jnp.float32) + low


def side_by_side(kernels: Sequence[Any], join: Callable[..., Any]) -> Any:
    """Kernels of the same states as one; `join` concatenates arrays along their last axis.

    Adapters too: A side by side, B in blocks along the diagonal.
    """
    bare = [k.kernel if isinstance(k, Adapted) else k for k in kernels]
    if isinstance(bare[0], NF4):
        bare = nf4.alike(bare)
    whole = jax.tree.map(join, *bare, is_leaf=lambda x: isinstance(x, tuple))
    adapted = [k for k in kernels if isinstance(k, Adapted)]
    if not adapted:
        return whole
    rows, first = [], 0
    for kernel in kernels:
        outputs = kernel.shape[-1]
        if isinstance(kernel, Adapted):
            rest = whole.shape[-1] - first - outputs
            rows.append(jnp.pad(kernel.b, ((0, 0), (first, rest))))
        first += outputs
    return Adapted(
        whole,
        jnp.concatenate([k.a for k in adapted], axis=-1),
        jnp.concatenate(rows, axis=0),
        jnp.concatenate([k.scaling for k in adapted], axis=-1),
    )


def is_node(x: Any) -> bool:
    """Whether it is a kernel of several arrays."""
    return in_codes(x) or isinstance(x, Adapted)


def in_codes(x: Any) -> bool:
    """Whether it is an array in 8 or 4 bits."""
    return isinstance(x, (Int8, NF4))


def name_of(path: Sequence[Any]) -> str:
    """The name of a parameter by its path in a pytree; in an `Adapted` that of its part."""
    return getattr(path[-1], "key", None) or path[-1].name


def in_precision(params: Params, dtype: Any, *, int8: bool = False) -> Params:
    """Parameters as `dtype`; with `int8` kernels and embeddings in 8 bits. Codes stay codes."""

    def one(path, x: Any) -> Any:
        if in_codes(x) or name_of(path) in _UNCAST:
            return x
        axis = _SHARED.get(name_of(path)) if int8 else None
        return x.astype(dtype) if axis is None else quantize.int8(x, axis)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=in_codes)


def with_plain_scales(params: Params) -> Params:
    """Parameters whose NF4 kernels have their scales in float32."""
    one = lambda x: nf4.with_plain_scales(x) if isinstance(x, NF4) else x  # noqa: E731
    return jax.tree.map(one, params, is_leaf=in_codes)


def axes_of(params: Params, axes: Params) -> Params:
    """The logical axes of parameters some of which are in codes or adapted.

    `axes`: those of the plain parameters, a tuple of names for each.
    """

    def one(path, x: Any, names: tuple) -> Any:
        if isinstance(x, Adapted):
            *stack, rows, columns = names
            kernel = one(path, x.kernel, names)
            low = (*stack, rows, None), (*stack, None, columns), (*stack, None)
            return Adapted(kernel, *low)
        if isinstance(x, Int8):
            kept = list(names)
            del kept[_SHARED[name_of(path)]]
            return Int8(names, tuple(kept))
        if isinstance(x, NF4):
            return nf4.axes_of(x, names)
        return names

    return jax.tree_util.tree_map_with_path(one, params, axes, is_leaf=is_node)
