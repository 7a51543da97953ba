"""Which random key belongs to which use at which step.

Every use names a purpose and a step, so that a resumed run derives the same keys again and no key
is ever stored. Rows fold in their own number and tokens their position: the draw of a token does
not depend on the batch it was drawn in.
"""

import jax
import numpy as np

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


# Explicit, since another default, rbg, draws rows under vmap that depend on the batch.
_KIND = "threefry2x32"


def key_for(seed: int, purpose: str, step: int | jax.Array = 0) -> jax.Array:
    """The key for one use at one step; a resumed run recomputes it, so no key is saved."""
    numbers = PURPOSES.index(purpose), step
    if all(isinstance(n, int) and 0 <= n < 2**31 for n in (seed, *numbers)):
        key_2 = np.array([0, seed], np.uint32)
        for number in numbers:
            key_2 = folded(key_2, np.array([number]))[0]
        return jax.random.wrap_key_data(key_2, impl=_KIND)
    key = jax.random.key(seed, impl=_KIND)
    return jax.random.fold_in(jax.random.fold_in(key, numbers[0]), step)  # in a program


def row_keys(key: jax.Array, num_rows: int) -> np.ndarray:
    """The data of a key for each row, uint32 [B, 2], folded in as `jax.random.fold_in` does."""
    return folded(np.asarray(jax.random.key_data(key)), np.arange(num_rows))


_TURNS = (13, 15, 26, 6), (17, 29, 16, 24)  # bits, in every other of the five rounds


def folded(key_2: np.ndarray, number_B: np.ndarray) -> np.ndarray:
    """The data of a key with each number folded in, uint32 [B, 2], by NumPy.

    Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
    of (0, number). JAX would compile a program for it, and one for each number of rows.
    """
    first, second = key_2[:1], key_2[1:]
    parts = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    x, y = np.broadcast_to(first, number_B.shape), second + number_B.astype(np.uint32)
    for i in range(5):
        for turn in _TURNS[i % 2]:
            x = x + y
            y = x ^ (y << np.uint32(turn) | y >> np.uint32(32 - turn))
        x, y = x + parts[(i + 1) % 3], y + parts[(i + 2) % 3] + np.uint32(i + 1)
    return np.stack([x, y], axis=-1)
