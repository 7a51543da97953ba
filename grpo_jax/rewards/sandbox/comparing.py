"""Whether what a program printed or returned is what was wanted: outside of its process."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

_TOLERANCE = 1e-6  # of numbers with a fraction, relative and absolute
_MAX_DIGITS = 40


def same_output(got: str, wanted: str) -> bool:
    """Whether two outputs are equal: line by line, without spaces at line ends and empty lines
    at the end; or word by word, where words of both that are numbers with a point agree to 1e-6.
    """
    got_lines, wanted_lines = _lines(got), _lines(wanted)
    if got_lines == wanted_lines:
        return True
    if len(got_lines) != len(wanted_lines):
        return False
    for one, other in zip(got_lines, wanted_lines):
        words, others = one.split(), other.split()
        if len(words) != len(others) or not all(map(_same_word, words, others)):
            return False
    return True


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same_word(got: str, wanted: str) -> bool:
    if got == wanted:
        return True
    if "." not in wanted or max(len(got), len(wanted)) > _MAX_DIGITS:
        return False
    try:
        return _close(float(got), float(wanted))
    except ValueError:
        return False


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def same_value(got: Any, wanted: Any) -> bool:
    """Whether a returned value is the wanted one, which comes from JSON.

    A tuple equals a list, a set equals a list of its members in any order, keys of a dict are equal
    as texts, and numbers with a fraction agree to 1e-6. True is not 1.
    """
    if isinstance(got, (set, frozenset)) or isinstance(wanted, (set, frozenset)):
        return _same_set(got, wanted)
    if isinstance(wanted, (list, tuple)):
        is_list = isinstance(got, (list, tuple)) and len(got) == len(wanted)
        return is_list and all(map(same_value, got, wanted))
    if isinstance(wanted, dict):
        if not isinstance(got, dict) or len(got) != len(wanted):
            return False
        by_text = {str(key): value for key, value in got.items()}
        return by_text.keys() == {str(k) for k in wanted} and all(
            same_value(by_text[str(key)], value) for key, value in wanted.items()
        )
    if isinstance(got, bool) or isinstance(wanted, bool):
        return got is wanted
    numbers = (int, float, Fraction, Decimal)
    if isinstance(got, numbers) and isinstance(wanted, numbers):
        if isinstance(got, int) and isinstance(wanted, int):
            return got == wanted
        try:
            return got == wanted or _close(float(got), float(wanted))
        except (OverflowError, ValueError):
            return False
    return type(got) is type(wanted) and got == wanted


def _same_set(got: Any, wanted: Any) -> bool:
    kinds = (set, frozenset, list, tuple)
    if not isinstance(got, kinds) or not isinstance(wanted, kinds) or len(got) != len(wanted):
        return False
    left = list(wanted)
    for value in got:
        match = next((i for i, x in enumerate(left) if same_value(value, x)), None)
        if match is None:
            return False
        del left[match]
    return True
