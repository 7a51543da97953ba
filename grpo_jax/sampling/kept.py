"""The host's side of later turns: which lanes go on, and the tokens that they get.

Beside the axes of `structs.py`, S are shards of the slots here, and M tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from grpo_jax.sampling.board import Board, Turn
from grpo_jax.sampling.decode import Slots
from grpo_jax.sampling.layouts import Layout

# Tokens of a chunk: few sizes, each is compiled. More tokens come in several of the largest, which
# bounds the memory that their scores take.
_SIZES = (4, 6, 10, 16, 24, 40, 64)


class Kept:
    """Slots in which turns have ended, while their environments answer; at first there are none.

    `again`: it takes those of later turns, too, if they are read with all their tokens.
    """

    def __init__(self, *, again: bool = False) -> None:
        self.again = again
        self.width = 0  # of the prompts
        # While a turn's last lanes are decoded in smaller slots: all of them, and where those came
        # from, as `decode.put_back` takes it.
        self.shelf: tuple[Slots, Board, tuple] | None = None
        self._held: tuple[Slots, Board, list[Layout]] | None = None

    def keep(self, slots: Slots, board: Board, layouts: list[Layout], width: int) -> None:
        """Takes slots over. `layouts`: theirs, and the smaller ones to move to."""
        self._held, self.width = (slots, board, layouts), width

    def holds(self, rows: Sequence[int]) -> bool:
        """Whether all these completions are in the slots."""
        return self._held is not None and bool(np.isin(rows, self._held[1].owner_SRW).all())

    def taken(self, turns: Sequence[Turn]) -> tuple[Slots, Board, list[Layout]]:
        """The slots, with the lanes of these turns marked as busy; they are no longer here."""
        assert self._held is not None
        (slots, board, layouts), self._held = self._held, None
        goes_on_SRW = np.isin(board.owner_SRW, [turn.rows[0] for turn in turns])
        board.row_SRW = np.where(goes_on_SRW, board.owner_SRW, -1)
        board.owner_SRW = board.row_SRW.copy()
        return slots, board, layouts


@dataclasses.dataclass(frozen=True)
class Chunks:
    """What lanes get before their next turn, by lane in the device's layout; see `kv_cache.Chunk`.

    A lane gets its last token, whose keys and values no decode step has computed, and what the
    environment said.
    """

    shift_RW: np.ndarray  # columns by which a lane's tokens move along the ring
    of_lanes: tuple[np.ndarray, ...]  # length_RW, count_RW, limit_RW
    column: int
    pieces: list[tuple[np.ndarray, int]]  # ids_RWM, and the age of the last token

    @staticmethod
    def of(board: Board, turns: Sequence[Turn], ring: int) -> Chunks:
        """The chunks of the board's busy lanes; the board is then that of the next turns.

        `ring`: the number of its columns. The lane that ended last stays where it is.
        """
        by_row = {turn.rows[0]: turn for turn in turns}
        busy = np.argwhere(board.row_SRW >= 0)
        own = [(tuple(at), by_row[int(board.row_SRW[tuple(at)])]) for at in busy]
        length, count, limit, end = np.zeros((4, *board.row_SRW.shape), np.int32)
        for at, turn in own:
            first = turn.first - board.base_SRW[at]
            length[at], limit[at] = first, first + turn.limit
            count[at] = first - board.last_SRW[at]
            drawn = board.last_SRW[at] - board.begin_SRW[at]
            end[at] = board.column + drawn + count[at]
        column = int(end.max())
        sizes = _sizes(int(count.max()), ring)
        ids = np.zeros((*board.row_SRW.shape, sum(sizes)), np.int32)
        for at, turn in own:
            ids[at][-count[at] :] = turn.ids[-count[at] :]
            board.begin_SRW[at] = length[at]
        shift = np.where(board.row_SRW >= 0, column - end, 0).astype(np.int32)
        board.column = column % ring
        flat = lambda x_SRW: x_SRW.reshape(-1, *x_SRW.shape[2:])  # noqa: E731
        past = np.cumsum(sizes)
        pieces = [(flat(ids[..., n - size : n]), int(past[-1] - n)) for size, n in zip(sizes, past)]
        return Chunks(flat(shift), tuple(map(flat, (length, count, limit))), board.column, pieces)


def sizes_for(ring: int) -> list[int]:
    """All sizes of chunks that a ring of so many columns takes."""
    return sorted({min(size, ring) for size in _SIZES})


def _sizes(tokens: int, ring: int) -> list[int]:
    """The sizes of the chunks for so many tokens; the first may have padding."""
    *_, largest = sizes = sizes_for(ring)
    rest = tokens % largest
    first = [next(size for size in sizes if size >= rest)] if rest else []
    return first + [largest] * (tokens // largest)
