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

    Every data shard has microbatches of its own groups, with a leading axis for the shard. Stacks
    of a shape are equally high, so that one program runs them all; those past `count` are empty.
    """

    count: np.ndarray  # int32: microbatches in it
    groups_SNM: np.ndarray  # int32: which of the shard's prompts; -1 for none, to fill a shape
    layout_SNMLT: np.ndarray  # int32: g * C + c for token c of completion g, -1: an empty slot

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.groups_SNM, self.layout_SNMLT


def stacks(
    length_SPG: np.ndarray,
    groups_P: np.ndarray,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    at_once: int,
    devices: int = 1,
) -> Iterator[Stack]:
    """The groups of numbers `groups_P` of each shard in microbatches of at most `at_once` tokens.

    The tokens are padded limits and count on each of a shard's `devices`; a microbatch has at least
    one group for each of them. A function of the lengths alone, so that a resumed run sums in the
    same order.
    """
    shards, _, group = length_SPG.shape
    width = max(completion_tokens - 1, 1)
    lanes_SP = [[_fill(length_PG[p] - 1, width) for p in groups_P] for length_PG in length_SPG]
    # The widest first. All shards take equally many, so that none waits for another; where one has
    # fewer of a width, it goes on with its narrower ones.
    waiting_S = [
        sorted(range(len(groups_P)), key=lambda i, lanes_P=lanes_P: (-len(lanes_P[i]), i))
        for lanes_P in lanes_SP
    ]
    while any(waiting_S):
        menu_S = [
            [_menu(len(lanes_P[i]), group) for i in waiting]
            for lanes_P, waiting in zip(lanes_SP, waiting_S)
        ]
        lanes = max(max(menu) for menu in menu_S)
        size = devices * _largest_divisor(
            -(-len(groups_P) // devices), at_once // (prompt_tokens + lanes * width)
        )
        height = -(-len(groups_P) // size)
        count = np.int32(max(-(-menu.count(lanes) // size) for menu in menu_S))
        groups_SX = np.full((shards, height * size), -1, np.int32)
        layout_SXLT = np.full((shards, height * size, lanes, width), -1, np.int32)
        for s, waiting in enumerate(waiting_S):
            chosen, waiting_S[s] = waiting[: count * size], waiting[count * size :]
            groups_SX[s, : len(chosen)] = groups_P[chosen]
            for x, i in enumerate(chosen):
                length_G = length_SPG[s, groups_P[i]]
                for lane_T, completions in zip(layout_SXLT[s, x], lanes_SP[s][i]):
                    _place(lane_T, completions, length_G, completion_tokens)
        yield Stack(
            count,
            groups_SX.reshape(shards, height, size),
            layout_SXLT.reshape(shards, height, size, lanes, width),
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
