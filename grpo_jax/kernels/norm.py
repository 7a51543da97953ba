"""The residual stream and its RMS norms, in plain XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from grpo_jax.structs import Array


class Residual(NamedTuple):
    """The residual stream [..., D] as two parts, whose sum it is.

    The next norm adds them: `gpu_norm.FusedNorm` does so in the same kernel.
    """

    states: Array
    branch: Array  # the output of the last attention or MLP

    @staticmethod
    def of(states: Array) -> Residual:
        """States with a branch of zeros, which XLA removes."""
        return Residual(states, jnp.zeros_like(states))

    def sum(self) -> Array:
        return self.states + self.branch


class Norm(nn.Module):
    """An RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32, as `dtype`.

    The scale is a parameter and an offset. As `flax.linen.RMSNorm`, in a third of its operations.
    """

    epsilon: float
    dtype: Any
    scale_init: Callable = nn.initializers.ones
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale_D = parameter(self, "scale", self.scale_init, x.shape[-1:])
        scale_D = lax.convert_element_type(scale_D, jnp.float32)
        if self.offset:
            scale_D += self.offset
        last = x.ndim - 1
        # Converted twice: the gradients of the two are added in the dtype of x.
        square = lax.square(lax.convert_element_type(x, jnp.float32))
        mean_square = lax.reduce_sum(square, axes=(last,)) / x.shape[-1]
        by_token = lax.rsqrt(lax.expand_dims(mean_square, (last,)) + self.epsilon)
        scaled = by_token * lax.expand_dims(scale_D, range(last))
        y = lax.convert_element_type(x, jnp.float32) * scaled
        return lax.convert_element_type(y, self.dtype)


class AddNorm(Norm):
    """The sum of a residual stream, and its RMS norm."""

    def __call__(self, x: Residual) -> tuple[Array, Array]:
        total = x.sum()
        return total, super().__call__(total)


def parameter(module: nn.Module, name: str, first: Callable, shape: tuple[int, ...]) -> Array:
    """A module's parameter, as `Module.param`, which traces `first` at each call."""
    if not module.has_variable("params", name):
        return module.param(name, first, shape)
    given = module.get_variable("params", name)
    assert given.shape == shape, (name, given.shape, shape)
    return given
