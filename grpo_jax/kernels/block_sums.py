"""Sums of the vocabulary's exponentials, block by block, in plain XLA.

N are blocks of the vocabulary here, and W the tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from grpo_jax.structs import Array


def sums_of_blocks(blocks_BNW: Array, temperature: Array | float) -> tuple[Array, Array]:
    """The sum of each block's exponentials [B, N], after the row's maximum [B, 1] is subtracted."""
    blocks_BNW = blocks_BNW / temperature
    peak_B1 = blocks_BNW.max((1, 2))[:, None]
    return jnp.exp(blocks_BNW - peak_B1[..., None]).sum(-1), peak_B1


Sums = Callable[[Array, Array | float], tuple[Array, Array]]
