"""Completions of a group laid out in fewer, fuller lanes: padding that is not there costs nothing.

A group's row is its prompt, once, and some lanes of equal width; a lane holds one completion or
several, each attending to the prompt and to itself. Which token stands where is one array of
integers, made on the host from the completions' lengths. A slot of a lane predicts the token that
it is numbered by and reads the one before it; a completion's first token is predicted by the
prompt, so a completion of n tokens takes n - 1 slots.

Shapes are few, since each is compiled once: lanes come in the steps of a menu, and their number
decides how many groups stand together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

_LANES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some groups of a rollout and how their completions are laid out."""

    groups_M: np.ndarray  # int32: which prompts; -1 for none, to fill a shape
    layout_MLT: np.ndarray  # int32: g * C + c for token c of completion g, -1 where a slot is empty


def parts(length_PG: np.ndarray, tokens: int, groups_P: np.ndarray, size: int) -> Iterator[Part]:
    """The groups of numbers `groups_P` in parts of about the cost of `size` full groups.

    `tokens`: C, the completions' padded length. A function of the lengths alone, so that a resumed
    run sums in the same order.
    """
    group, width = length_PG.shape[1], max(tokens - 1, 1)
    lanes_P = [_fill(length_PG[p] - 1, width) for p in groups_P]
    waiting = sorted(range(len(groups_P)), key=lambda i: (-len(lanes_P[i]), i))
    while waiting:
        lanes = _menu(len(lanes_P[waiting[0]]), group)
        count = size * (group // lanes)
        chosen, waiting = waiting[:count], waiting[count:]
        groups_M = np.full(count, -1, np.int32)
        groups_M[: len(chosen)] = groups_P[chosen]
        layout_MLT = np.full((count, lanes, width), -1, np.int32)
        for m, i in enumerate(chosen):
            for lane, completions in enumerate(lanes_P[i]):
                _place(layout_MLT[m, lane], completions, length_PG[groups_P[i]], tokens)
        yield Part(groups_M, layout_MLT)


def _menu(lanes: int, group: int) -> int:
    return min((n for n in (*_LANES, group) if lanes <= n <= group), default=group)


def _fill(slots_G: np.ndarray, width: int) -> list[list[int]]:
    """Completions by lane, the longest first, each into the first lane with room (at least one)."""
    lanes: list[list[int]] = []
    room: list[int] = []
    for g in np.argsort(-slots_G, kind="stable"):
        need = int(slots_G[g])
        if not need:
            break
        lane = next((i for i, free in enumerate(room) if free >= need), len(room))
        if lane == len(room):
            lanes.append([])
            room.append(width)
        lanes[lane].append(int(g))
        room[lane] -= need
    return lanes or [[]]


def _place(lane_T: np.ndarray, completions: list[int], length_G: np.ndarray, tokens: int) -> None:
    at = 0
    for g in completions:
        n = int(length_G[g]) - 1
        lane_T[at : at + n] = g * tokens + np.arange(1, n + 1)
        at += n
