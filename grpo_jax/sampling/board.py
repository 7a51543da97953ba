"""What the host knows of the slots: which completions they decode, and which wait for one."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Turn:
    """Tokens to draw after a prefix: a completion from its start, or a later turn of an episode.

    Its rows share the prefix, and each has a lane of one slot.
    """

    rows: Sequence[int]  # global numbers of completions, from which their random keys follow
    ids: Sequence[int]  # the prefix: prompt, and what the completion has so far
    first: int  # position in the completion of the first token to draw
    limit: int  # tokens to draw, at most


class Source(Protocol):
    """Turns that come while others are decoded."""

    @property
    def pending(self) -> bool:
        """Whether further turns may come."""

    def take(self, wait: bool) -> list[tuple[int, Turn]]:
        """The turns that have come, each with its shard; with `wait` at least one if any comes."""


class _NoMore:
    """No further turns."""

    pending = False

    def take(self, wait: bool) -> list[tuple[int, Turn]]:
        return []


NO_MORE = _NoMore()

Queues = list[collections.deque[Turn]]  # of each shard


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What n rows have drawn; tokens only where this process holds them."""

    row_B: np.ndarray  # global numbers
    token_BC: np.ndarray  # int32
    logp_BC: np.ndarray  # float32
    length_B: np.ndarray
    stopped_B: np.ndarray  # bool: by a stop token


@dataclasses.dataclass
class Board:
    """The completion that each lane decodes: its global row number, or -1; slots by shard."""

    row_SRW: np.ndarray
    # What later turns in the same lanes need to know of the present ones.
    owner_SRW: np.ndarray  # the completion that the lane decodes or has decoded, or -1
    begin_SRW: np.ndarray  # of its turn, the position of the first token among the lane's own
    last_SRW: np.ndarray  # the position of the last token, once the turn has ended
    base_SRW: np.ndarray  # position in the completion of the lane's first own token
    column: int = 0  # of the ring, at which the turns of all lanes began

    @staticmethod
    def empty(shards: int, slots: int, lanes: int) -> Board:
        shape = shards, slots, lanes
        return Board(*(np.full(shape, fill) for fill in (-1, -1, 0, 0, 0)))

    @property
    def row_RW(self) -> np.ndarray:  # noqa: N802
        """The same in the device's layout, one shard after the other."""
        return self.row_SRW.reshape(-1, self.row_SRW.shape[-1])

    @property
    def free_SR(self) -> np.ndarray:  # noqa: N802
        """True for slots without a completion."""
        return (self.row_SRW < 0).all(axis=2)

    @property
    def is_busy(self) -> bool:
        return bool((self.row_SRW >= 0).any())

    def takes(self, waiting: Queues, least: int) -> bool:
        """Whether a shard has as many free slots as `least`, or as all turns in its queue need."""
        free_S = self.free_SR.sum(axis=1)
        return any(queue and n >= min(least, len(queue)) for queue, n in zip(waiting, free_S))

    def place(self, waiting: Queues, size: int, width: int, key_B2: np.ndarray) -> tuple:
        """Arguments of `decode.admit` for up to `size` turns a shard, taken from its queue."""
        shards, num_slots, lanes = self.row_SRW.shape
        slot_SA = np.full((shards, size), num_slots, np.int32)
        prompt_SAQ = np.zeros((shards, size, width), np.int32)
        length_SA = np.ones((shards, size), np.int32)
        key_SAW2 = np.zeros((shards, size, lanes, 2), np.uint32)
        used_SAW = np.zeros((shards, size, lanes), bool)
        first_SAW, limit_SAW = np.zeros((2, shards, size, lanes), np.int32)
        free = [np.flatnonzero(free_R)[:size] for free_R in self.free_SR]
        for s, a in np.ndindex(shards, size):
            if not waiting[s] or a >= len(free[s]):
                continue
            turn = waiting[s].popleft()
            rows = list(turn.rows)
            slot_SA[s, a] = free[s][a]
            prompt_SAQ[s, a, : len(turn.ids)], length_SA[s, a] = turn.ids, len(turn.ids)
            key_SAW2[s, a, : len(rows)], used_SAW[s, a, : len(rows)] = key_B2[rows], True
            first_SAW[s, a], limit_SAW[s, a] = turn.first, turn.limit
            self.row_SRW[s, free[s][a], : len(rows)] = rows
            self.owner_SRW[s, free[s][a]] = self.row_SRW[s, free[s][a]]
            self.begin_SRW[s, free[s][a]], self.base_SRW[s, free[s][a]] = 0, turn.first
        fields = prompt_SAQ, length_SA, slot_SA, key_SAW2, used_SAW, first_SAW, limit_SAW
        return tuple(x.reshape(-1, *x.shape[2:]) for x in fields)

    def ended(self, done_RW: np.ndarray, time_RW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frees lanes; returns their rows, and where their turns began, in the device's layout.

        `time_RW`: the position of each lane's last token.
        """
        in_layout = lambda x_SRW: x_SRW.reshape(done_RW.shape)  # noqa: E731
        rows, begin_B = self.row_RW[done_RW], in_layout(self.begin_SRW)[done_RW]
        in_layout(self.last_SRW)[done_RW] = time_RW[done_RW]
        self.row_RW[done_RW] = -1
        return rows, begin_B

    def moved(self, layout: tuple[int, int]) -> tuple[Board, tuple]:
        """The live completions on a smaller board, and the arguments of `decode.compact`."""
        shards, (num_slots, lanes) = len(self.row_SRW), layout
        slot_SR = np.zeros((shards, num_slots), np.int32)
        lane_SRW = np.zeros((shards, num_slots, lanes), np.int32)
        new = dataclasses.replace(Board.empty(shards, num_slots, lanes), column=self.column)
        for s in range(shards):
            at = 0
            for old, rows in enumerate(self.row_SRW[s]):
                alive = np.flatnonzero(rows >= 0)
                for start in range(0, len(alive), lanes):
                    part = alive[start : start + lanes]
                    slot_SR[s, at], lane_SRW[s, at, : len(part)] = old, part
                    for name in ("row_SRW", "owner_SRW", "begin_SRW", "last_SRW", "base_SRW"):
                        of_old = getattr(self, name)[s, old, part]
                        getattr(new, name)[s, at, : len(part)] = of_old
                    at += 1
        return new, (slot_SR.reshape(-1), lane_SRW.reshape(-1, lanes), new.row_RW >= 0)

    def put_back(self, smaller: Board) -> None:
        """Takes over what has become of the lanes that have moved to a smaller board."""
        place_of = {row: n for n, row in enumerate(self.owner_SRW.flat)}
        for n, row in enumerate(smaller.owner_SRW.flat):
            if row >= 0:
                self.row_SRW.flat[place_of[row]] = smaller.row_SRW.flat[n]
                self.last_SRW.flat[place_of[row]] = smaller.last_SRW.flat[n]
