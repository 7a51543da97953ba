"""Some of the training problems, by their numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from grpo_jax.messages.values import shown

_RANGE = re.compile(r"(\d*):(\d*)")


def take(items: Sequence[Any], chosen: Sequence[int | str]) -> list[Any]:
    """The items of the numbers and ranges in `chosen` (data.subset), in that order; () for all.

    A range "FIRST:STOP" ends before STOP; without one of them it begins or ends with the items.
    Raises ValueError for another entry, a number that no item has, and one that stands there twice.
    """
    if not chosen:
        return list(items)
    numbers = [number for entry in chosen for number in _numbers(entry, len(items))]
    twice = [number for number in dict.fromkeys(numbers) if numbers.count(number) > 1]
    if twice:
        raise ValueError(
            f"data.subset = {shown(tuple(chosen))} has problem {twice[0]} twice. Name each once; "
            "data.repeat asks them more often."
        )
    return [items[number] for number in numbers]


def _numbers(entry: int | str, count: int) -> range:
    number = int(entry) if str(entry).isdecimal() else None
    found = _RANGE.fullmatch(str(entry))
    if number is not None:
        first, stop = number, number + 1
    elif found:
        first, stop = int(found[1] or 0), int(found[2] or count)
    else:
        raise ValueError(
            f"data.subset: {shown(entry)} is neither the number of a problem nor a range. Write "
            '(0,) for the first, or ("0:100",) for the first hundred.'
        )
    if not first < stop <= count:
        raise ValueError(
            f"data.subset: {shown(entry)} names no problems of the {count} training problems, "
            f"which have the numbers 0 to {count - 1}."
        )
    return range(first, stop)
