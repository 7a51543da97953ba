"""Which tokens carry the policy gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.structs import Array


def top_entropy(entropy: Array, action: Array, share: float) -> Array:
    """True for the action tokens whose entropy is in the top `share` of all of them, bool.

    Wang et al. 2025, arXiv:2506.01939, with the quantile that TRL takes: of n tokens
    the 1 + floor(share (n - 1)) of highest entropy, and those that are equal to the last of them.
    `entropy` is float32, in nats, of any shape; what is not finite counts as 0.
    """
    # Floats that are not negative have the order of their bits. So 31 counts find the lowest
    # entropy that is kept, bit by bit: no sort, which would gather a sharded batch.
    entropy = jnp.where((entropy > 0) & (entropy < jnp.inf), entropy, 0.0)
    bits = jnp.where(action, jax.lax.bitcast_convert_type(entropy, jnp.int32), -1)
    rest = jnp.maximum(action.sum() - 1, 0).astype(jnp.float32)
    num_kept = 1 + jnp.floor(share * rest).astype(jnp.int32)

    def with_bit(n: Array, lowest: Array) -> Array:
        higher = lowest | (1 << (30 - n))
        return jnp.where((bits >= higher).sum() >= num_kept, higher, lowest)

    return bits >= jax.lax.fori_loop(0, 31, with_bit, jnp.int32(0))
