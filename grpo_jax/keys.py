"""Which random key belongs to which use at which step.

Every use names a purpose and a step, so that a resumed run derives the same keys again and no key
is ever stored. Rows fold in their own number and tokens their position: the draw of a token does
not depend on the batch it was drawn in.
"""

import jax

# Append only: the position is part of the key.
PURPOSES = (
    "init",
    "rollout",
    "evaluate",
    "sft",
    "moments",
    "parameters",
    "adapters",
    "head",
    "label",
    "critic's adapters",
)


def key_for(seed: int, purpose: str, step: int = 0) -> jax.Array:
    """The key for one use at one step; a resumed run recomputes it, so no key is saved."""
    # Explicit, since another default, rbg, draws rows under vmap that depend on the batch.
    root = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(root, PURPOSES.index(purpose)), step)
