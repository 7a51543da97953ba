"""Adam with moments stored in bfloat16 or 8 bits, and computed in float32.

One update may change a moment by only a tenth or a hundredth of itself, less than the spacing of
such numbers. Rounded to the nearest, second moments would stop changing, and so would the first
moment of a weight without gradient. So rounding is stochastic and unbiased. The random bits follow
from the seed and the update count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from grpo_jax import keys
from grpo_jax.structs import Array, Params

_LONGEST_BLOCK = 128  # entries that share a peak, which costs 0.03 bytes an entry


@struct.dataclass
class Blocks:
    """A moment in 8 bits, in blocks along its last axis (Dettmers et al. 2021, arXiv:2110.02861).

    An entry is ± (|code| / largest code)^p times the peak of its block, p = 2 for a first moment
    (int8), 4 for a second (uint8): finer near 0, where most entries are. This formula replaces the
    paper's table. The smallest first moment is 1 / 16,000 of the peak, and the root of the smallest
    second moment 1 / 65,000.
    """

    codes: Array  # int8 or uint8 [..., n], the parameter's shape
    peak: Array  # float32 [..., n / block]: the largest magnitude of each block


def to_blocks(x: Array, bits: Array, *, signed: bool) -> Blocks:
    """`x` in 8 bits, rounded by `bits` (uint32 below 2^16): the mean over `bits` is `x`.

    If unsigned, an entry above 0 never becomes 0: a first moment divided by its root would be
    infinite. Blocks are equal parts of the last axis; their length is its largest divisor up to
    128.
    """
    levels, power, dtype = (127, 2, jnp.int8) if signed else (255, 4, jnp.uint8)
    blocks = x.reshape(*x.shape[:-1], -1, _block(x.shape[-1]))
    peak = jnp.abs(blocks).max(axis=-1, keepdims=True)
    share = jnp.abs(blocks) / jnp.where(peak == 0, 1.0, peak)
    root = jnp.sqrt(share) if signed else jnp.sqrt(jnp.sqrt(share))
    below = jnp.floor(levels * root)
    low, high = ((below + i) / levels for i in (0, 1))
    uniform = bits.reshape(blocks.shape).astype(jnp.float32) / 2**16
    codes = below + (uniform < (share - low**power) / (high**power - low**power))
    least = 0 if signed else (share > 0).astype(jnp.float32)
    codes = jnp.clip(codes, least, levels) * jnp.sign(blocks)
    return Blocks(codes.reshape(x.shape).astype(dtype), peak[..., 0])


def from_blocks(kept: Blocks) -> Array:
    """The float32 values of the blocks."""
    levels, power = (127, 2) if kept.codes.dtype == jnp.int8 else (255, 4)
    codes = kept.codes.astype(jnp.float32).reshape(*kept.peak.shape, -1)
    values = jnp.sign(codes) * jnp.abs(codes / levels) ** power * kept.peak[..., None]
    return values.reshape(kept.codes.shape)


def _block(entries: int) -> int:
    """Entries of a block: the largest divisor of the axis within the limit."""
    return next(n for n in range(min(entries, _LONGEST_BLOCK), 0, -1) if entries % n == 0)


def to_bfloat16(x: Array, bits: Array) -> Array:
    """Finite float32 `x` as one of its two bfloat16 neighbors; the mean over `bits` is `x`.

    `bits`: uint32 below 2^16, added to the lower half of the float32; bfloat16 is its upper half.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits
    return jax.lax.bitcast_convert_type(raw & jnp.uint32(0xFFFF0000), jnp.float32).astype(
        jnp.bfloat16
    )


class State(NamedTuple):
    """The optimizer's state: moments by parameter, in their stored dtype."""

    count: Array  # int32: updates done
    mu: Params
    nu: Params


def scale_by_adam(
    *, beta1: float, beta2: float, eps: float, kept: str, seed: int
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` (Kingma & Ba 2014, arXiv:1412.6980), with moments stored as `kept`.

    "bfloat16" or "int8". An update is computed in float32 from the moments before they are rounded
    again.
    """
    put: dict[bool, Callable[[Array, Array], Array | Blocks]]
    if kept == "bfloat16":
        put, get = {True: to_bfloat16, False: to_bfloat16}, lambda x: x.astype(jnp.float32)
    else:
        put = {s: lambda x, bits, s=s: to_blocks(x, bits, signed=s) for s in (True, False)}
        get = from_blocks

    def zeros(params: Params, signed: bool) -> Params:
        nothing = lambda p: put[signed](jnp.zeros(p.shape), jnp.zeros(p.shape, jnp.uint32))  # noqa: E731
        return jax.tree.map(nothing, params)

    def init(params: Params) -> State:
        return State(jnp.int32(0), zeros(params, True), zeros(params, False))

    def update(grads: Params, state: State, params: Params | None = None) -> tuple[Params, State]:
        del params
        count = state.count + 1
        leaves, tree = jax.tree.flatten(grads)
        key = keys.key_for(seed, "moments", count)
        moved, mus, nus = [], [], []
        for grad, mu, nu in zip(leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)):
            bit = random_bits(key, grad.shape, after=nus)
            mu = beta1 * get(mu) + (1 - beta1) * grad
            nu = beta2 * get(nu) + (1 - beta2) * grad**2
            mean, square = mu / (1 - beta1**count), nu / (1 - beta2**count)
            moved.append(mean / (jnp.sqrt(square) + eps))
            mus.append(put[True](mu, bit & 0xFFFF))
            nus.append(put[False](nu, bit >> 16))
        moved, mus, nus = (tree.unflatten(x) for x in (moved, mus, nus))
        return moved, State(count, mus, nus)

    return optax.GradientTransformation(init, update)


def random_bits(key: Array, shape: tuple[int, ...], after: list) -> Array:
    """A random uint32 for each entry of the next array: 16 bits for each of its two roundings.

    `after`: the results of the arrays before it. Waiting for them keeps XLA from drawing the bits
    of all arrays at once, which would take 4 bytes for each parameter.
    """
    key = jax.random.fold_in(key, len(after))
    if after:
        key, _ = jax.lax.optimization_barrier((key, after[-1]))
    return jax.random.bits(key, shape)
