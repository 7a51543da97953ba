"""Completions of a group laid out in fewer, fuller lanes: padding that is not there costs nothing.

A group's row is its prompt, once, and some lanes of equal width; a lane holds one completion or
several, each attending to the prompt and to itself. Which token stands where is one array of
integers, made on the host from the completions' lengths. A slot of a lane predicts the token that
it is numbered by and reads the one before it; a completion's first token is predicted by the
prompt, so a completion of n tokens takes n - 1 slots.

Shapes are few, since each is compiled once: lanes come in the steps of a menu, and their number
decides how many groups stand together, so that a microbatch holds about as many tokens as is best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

_LANES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Microbatches of one shape: some groups of a rollout and how their completions are laid out.

    Stacks of a shape are equally high, so that one program runs them all; those past `count` are
    empty.
    """

    count: int  # microbatches in it
    groups_NM: np.ndarray  # int32: which prompts; -1 for none, to fill a shape
    layout_NMLT: np.ndarray  # int32: g * C + c for token c of completion g, -1: an empty slot


def stacks(
    length_PG: np.ndarray,
    groups_P: np.ndarray,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    at_once: int,
    shards: int = 1,
) -> Iterator[Stack]:
    """The groups of numbers `groups_P` in microbatches of at most `at_once` tokens on a device.

    The tokens are padded limits; a microbatch has at least one group for each of `shards` devices.
    A function of the lengths alone, so that a resumed run sums in the same order.
    """
    group, width = length_PG.shape[1], max(completion_tokens - 1, 1)
    lanes_P = [_fill(length_PG[p] - 1, width) for p in groups_P]
    waiting = sorted(range(len(groups_P)), key=lambda i: (-len(lanes_P[i]), i))
    while waiting:
        lanes = _menu(len(lanes_P[waiting[0]]), group)
        size = shards * _largest_divisor(
            -(-len(groups_P) // shards), at_once // (prompt_tokens + lanes * width)
        )
        height = -(-len(groups_P) // size)
        alike = sum(_menu(len(lanes_P[i]), group) == lanes for i in waiting)
        count = -(-alike // size)
        chosen, waiting = waiting[: count * size], waiting[count * size :]
        groups_X = np.full(height * size, -1, np.int32)
        groups_X[: len(chosen)] = groups_P[chosen]
        layout_XLT = np.full((height * size, lanes, width), -1, np.int32)
        for x, i in enumerate(chosen):
            for lane, completions in enumerate(lanes_P[i]):
                _place(layout_XLT[x, lane], completions, length_PG[groups_P[i]], completion_tokens)
        yield Stack(
            count,
            groups_X.reshape(height, size),
            layout_XLT.reshape(height, size, lanes, width),
        )


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(limit, 1))


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
