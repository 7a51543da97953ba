"""Reads the numbers from the return value of a reward function."""

from __future__ import annotations

import math
import numbers
from typing import Any

from grpo_jax.messages.values import counted, shown

# Without NumPy, whose import takes half of a worker's start.
FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127


class WrongValuesError(ValueError):
    """A reward function did not return a list, or an array, of one entry per completion."""


def read(name: str, values: Any, completions: list[Any]) -> tuple[list[float], dict[int, str]]:
    """One number for each completion, NaN for None; and faults of single values, by row.

    `values` is a list, or an array of any library that can be read as one. Its entries are numbers,
    arrays without axes, or None for "does not apply". Raises WrongValuesError if it is no list, or
    does not have one entry for each completion.
    """
    shape = getattr(values, "shape", None)
    has_axes = isinstance(shape, tuple) and len(shape) != 1
    entries = _plain(values)
    if has_axes or not isinstance(entries, (list, tuple)):
        what = f"a {type(values).__name__}{f' of shape {tuple(shape)}' if has_axes else ''}"
        raise WrongValuesError(
            f"The reward {name!r} returned {what}; it must return a list of one number, or None, "
            "per completion."
        )
    if len(entries) != len(completions):
        raise WrongValuesError(
            f"The reward {name!r} returned {counted(len(entries), 'value')} for "
            f"{counted(len(completions), 'completion')}; it must return one number, or None, for "
            "each."
        )
    found, faults = [], {}
    for row, entry in enumerate(entries):
        if type(entry) is not float:
            entry = _plain(entry)
        if entry is None:
            found.append(math.nan)
            continue
        is_number = isinstance(entry, numbers.Real)
        # Compared before conversion, which would make numbers too large for float32 infinite.
        if is_number and abs(entry) <= FLOAT32_MAX:
            found.append(float(entry))
            continue
        what = "beyond finite float32" if is_number else "not a number"
        faults[row] = (
            f"The reward {name!r} returned {shown(entry)} ({type(entry).__name__}) for row {row}, "
            f"which is {what}. Return a finite number, or None to give no reward. Its completion "
            f"was {shown(completions[row])}."
        )
        found.append(math.nan)
    return found, faults


def _plain(value: Any) -> Any:
    """An array as a list of Python numbers, or as one number if it has no axes; else the value.

    Arrays of NumPy, JAX, PyTorch, pandas and CuPy have `tolist`, which works on any device and with
    a gradient. NumPy reads other arrays.
    """
    if isinstance(value, (float, int, list, tuple, str, type(None))):
        return value
    if callable(as_list := getattr(value, "tolist", None)):
        return as_list()
    if hasattr(value, "__array__"):
        import numpy as np

        return np.asarray(value).tolist()
    return value
