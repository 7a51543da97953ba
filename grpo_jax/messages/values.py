"""Values and texts of any size, shortened for messages."""

from __future__ import annotations

from typing import Any


def shown(value: Any, limit: int = 200) -> str:
    """A value's repr, cut; cheap for long texts and large numbers."""
    if type(value) is int and value.bit_length() > 998:  # Python refuses to print very large ones
        return "10^300 or more"
    long = isinstance(value, str) and len(value) > limit
    text = repr(value[:limit] if long else value)
    return cut(f"{text}..." if long else text, limit)


def cut(text: str, limit: int = 80) -> str:
    """The beginning of a text, at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 value" or "3 values"."""
    return f"{number} {noun}{'s' * (number != 1)}"
