"""The residual stream and its RMS norms, in plain XLA."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

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


class Norm(nn.RMSNorm):
    """An RMS norm whose scale is a parameter and an offset, added in float32."""

    offset: float = 0.0

    def param(self, name: str, *args: Any, **kwargs: Any) -> Array:
        scale = super().param(name, *args, **kwargs)
        return scale.astype(jnp.float32) + self.offset if self.offset else scale


class AddNorm(Norm):
    """The sum of a residual stream, and its RMS norm."""

    def __call__(self, x: Residual) -> tuple[Array, Array]:
        total = x.sum()
        return total, super().__call__(total)
