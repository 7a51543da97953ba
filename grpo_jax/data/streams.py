"""Random numbers for each use of the data; keys of the network are in `keys.py`."""

from __future__ import annotations

import numpy as np

# Append only: the index of a purpose is part of its stream.
PURPOSES = (
    *("order", "problems", "solutions", "choice", "held_out", "preferences"),
    *("demonstrations", "hints", "windows", "files", "environment", "rollouts"),
)


def stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """The random generator of one use; a resumed run derives the same one.

    The purpose is the last word of the seed. NumPy pads seeds with zeros, so purpose 0, the order
    of an epoch, has the same stream as before purposes existed.
    """
    return np.random.default_rng([seed, number, PURPOSES.index(purpose)])
