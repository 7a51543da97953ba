"""Values of Python as JSON, between processes that do not trust each other.

Numbers, texts, lists, tuples, dicts, sets and bytes arrive as they were. Subclasses arrive as the
plain type, and arrays as lists, so a value from elsewhere never brings an `==` of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_MAX_DEPTH = 200


class OpaqueError(ValueError):
    """A value that is none of the plain ones."""


def packed(value: Any, other: Callable[[Any], Any] | None = None, depth: int = 0) -> Any:
    """A value as JSON can hold it; `other` packs what is not plain, else OpaqueError is raised."""
    if value is None or value is True or value is False:
        return value
    if depth > _MAX_DEPTH:
        raise OpaqueError("it nests too deeply")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if number.bit_length() <= 64 else {"i": hex(number)}
    if isinstance(value, float):
        number = float.__float__(value)
        return number if math.isfinite(number) else {"f": repr(number)}
    if isinstance(value, complex):
        return {"c": [packed(value.real), packed(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"y": bytes(value).hex()}
    if isinstance(value, Fraction):
        return {"q": [packed(value.numerator), packed(value.denominator)]}
    if isinstance(value, Decimal):
        return {"m": Decimal.__str__(value)}
    each = lambda values: [packed(x, other, depth + 1) for x in values]  # noqa: E731
    if isinstance(value, list):
        return each(list.__iter__(value))
    if isinstance(value, tuple):
        return {"t": each(tuple.__iter__(value))}
    if isinstance(value, (set, frozenset)):
        return {"s": each(list(value))}
    if isinstance(value, dict):
        return {"d": [each(pair) for pair in dict.items(value)]}
    kind = type(value)
    if (kind.__module__ or "").partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return packed(value.tolist(), other, depth + 1)
    if other is not None:
        return other(value)
    raise OpaqueError(f"a {kind.__name__} is not plain data")


def unpacked(value: Any, other: Callable[[str, Any], Any] | None = None) -> Any:
    """The value of what `packed` gave; ValueError for what it cannot have given.

    `other` gets the kind and the content of what was packed by `other` there.
    """
    if not isinstance(value, (list, dict)):
        return value
    each = lambda values: [unpacked(x, other) for x in values]  # noqa: E731
    if isinstance(value, list):
        return each(value)
    ((kind, held),) = value.items()
    if kind == "i":
        return int(held, 16)
    if kind == "f":
        return float(held)
    if kind == "c":
        return complex(*each(held))
    if kind == "q":
        return Fraction(*each(held))
    if kind == "m":
        return Decimal(held)
    if kind == "y":
        return bytes.fromhex(held)
    if kind == "t":
        return tuple(each(held))
    if kind == "s":
        return set(each(held))
    if kind == "d":
        return dict(each(held))
    if other is not None:
        return other(kind, held)
    raise ValueError(f"unknown kind of value {kind!r}")
