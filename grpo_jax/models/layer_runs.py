"""The layers of a decoder as runs of a repeated pattern, and their parameters by run.

Layers of one kind are scanned: compiled once, their parameters stacked. If kinds alternate, a whole
period is scanned: five layers with a window and one without, eight times, compile as six layers. A
slot is a position in the pattern. Its parameters are stacked over the repeats of the pattern,
`layers/<run>/<slot>/...` [count, ...], or `layers/...` if all layers are of one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from grpo_jax.structs import Layer

_LONGEST = 16  # layers of a pattern; known models have at most 8


class Run(NamedTuple):
    """`count` times the layers of a pattern, one after another."""

    pattern: tuple[Layer, ...]
    count: int


class Place(NamedTuple):
    """The place of a layer's parameters: run, slot, and repeat (`turn`) of the pattern."""

    run: int
    slot: int
    turn: int


@functools.cache
def runs(layers: tuple[Layer, ...]) -> tuple[Run, ...]:
    """The runs with the fewest layers to compile; among equal divisions, the fewest runs."""
    number = len(layers)
    # For layers i and later: layers to compile, runs, and the first run's period and count.
    best = [(number + 1, number + 1, 0, 0)] * number + [(0, 0, 0, 0)]
    alike = [[0] * (number + 1) for _ in range(_LONGEST + 1)]  # by period: length of the repeat
    for i in reversed(range(number)):
        for period in range(1, min(_LONGEST, number - i) + 1):
            if i + period < number and layers[i] == layers[i + period]:
                alike[period][i] = alike[period][i + 1] + 1
            most = 1 + alike[period][i] // period
            for count in {most, max(most - 1, 1)}:  # the next run may use the last turn better
                size, then, *_ = best[i + count * period]
                best[i] = min(best[i], (size + period, then + 1, period, count))
    found, i = [], 0
    while i < number:
        *_, period, count = best[i]
        found.append(Run(layers[i : i + period], count))
        i += period * count
    return tuple(found)


@functools.cache
def places(layers: tuple[Layer, ...]) -> tuple[Place, ...]:
    """The place of each layer's parameters."""
    return tuple(
        Place(r, slot, turn)
        for r, run in enumerate(runs(layers))
        for turn in range(run.count)
        for slot in range(len(run.pattern))
    )


def members(layers: tuple[Layer, ...], run: int, slot: int) -> tuple[int, ...]:
    """The numbers of the layers whose parameters a slot stacks."""
    return tuple(i for i, place in enumerate(places(layers)) if place[:2] == (run, slot))


def slot_of(tree: Any, layers: tuple[Layer, ...], run: int, slot: int) -> Any:
    """The subtree of a slot in parameters by run, or in a tree of the same structure."""
    return tree if _is_one_slot(layers) else tree[str(run)][str(slot)]


def by_slot(
    layers: tuple[Layer, ...], make: Callable[[int, int, tuple[int, ...]], Any]
) -> dict[str, Any]:
    """The tree of `make(run, slot, layer numbers)` over all slots."""
    tree = {
        str(r): {str(s): make(r, s, members(layers, r, s)) for s in range(len(run.pattern))}
        for r, run in enumerate(runs(layers))
    }
    return tree["0"]["0"] if _is_one_slot(layers) else tree


def _is_one_slot(layers: tuple[Layer, ...]) -> bool:
    found = runs(layers)
    return len(found) == 1 and len(found[0].pattern) == 1
