"""Which random numbers belong to which use of the data; those of the network are in `keys.py`."""

from __future__ import annotations

import numpy as np

# Append only: the position is part of the stream.
PURPOSES = ("order", "problems", "solutions")


def stream(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """The random numbers of one use; a resumed run derives them again.

    The purpose is the last word and not the first: NumPy fills up with zeros, so the order of an
    epoch, the first purpose, is what it was when it had none.
    """
    return np.random.default_rng([seed, number, PURPOSES.index(purpose)])
