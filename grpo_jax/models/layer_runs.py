"""The layers of a decoder as runs of a repeated pattern, and their parameters by run.

Layers of one kind are scanned: compiled once, their parameters stacked. Where kinds alternate, a
whole period is what is scanned: five layers with a window and one without, eight times, compile as
six layers. A slot is a place in the pattern; its parameters are stacked over the pattern's turns,
`layers/<run>/<slot>/...` [count, ...], or `layers/...` where all layers are of one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from grpo_jax.structs import Layer

_LONGEST = 16  # layers of a pattern; those in use have 8 at most


class Run(NamedTuple):
    """`count` times the layers of a pattern, one after another."""

    pattern: tuple[Layer, ...]
    count: int


class Place(NamedTuple):
    """Where the parameters of a layer stand: a slot of a run, and the turn of its pattern."""

    run: int
    slot: int
    turn: int


@functools.cache
def runs(layers: tuple[Layer, ...]) -> tuple[Run, ...]:
    """The runs with the fewest layers to compile; of equal ones, the fewest runs."""
    number = len(layers)
    # From layer i on: layers to compile, runs, and the first run with its period and count.
    best = [(number + 1, number + 1, 0, 0)] * number + [(0, 0, 0, 0)]
    alike = [[0] * (number + 1) for _ in range(_LONGEST + 1)]  # by period: equal layers from here
    for i in reversed(range(number)):
        for period in range(1, min(_LONGEST, number - i) + 1):
            if i + period < number and layers[i] == layers[i + period]:
                alike[period][i] = alike[period][i + 1] + 1
            most = 1 + alike[period][i] // period
            for count in {most, max(most - 1, 1)}:  # the next run may make more of the last turn
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
    """Where the parameters of each layer stand."""
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
    """The part of a slot in parameters by run, or in what has their structure."""
    return tree if _is_one_slot(layers) else tree[str(run)][str(slot)]


def by_slot(
    layers: tuple[Layer, ...], make: Callable[[int, int, tuple[int, ...]], Any]
) -> dict[str, Any]:
    """The tree of what `make` gives for each run, slot, and the numbers of the slot's layers."""
    tree = {
        str(r): {str(s): make(r, s, members(layers, r, s)) for s in range(len(run.pattern))}
        for r, run in enumerate(runs(layers))
    }
    return tree["0"]["0"] if _is_one_slot(layers) else tree


def _is_one_slot(layers: tuple[Layer, ...]) -> bool:
    found = runs(layers)
    return len(found) == 1 and len(found[0].pattern) == 1
