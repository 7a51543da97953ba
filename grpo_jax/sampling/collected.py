"""The completions of a draw as they finish, group by group, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.sampling.board import Drawn
from grpo_jax.sampling.early_stop import FirstGroups
from grpo_jax.structs import Rollouts, pad_rows

# Takes a prompt's number and the token ids of its completions.
OnGroup = Callable[[int, list[list[int]]], None]


class Collected:
    """What is drawn of some prompts; each group is handed over once it is whole."""

    def __init__(
        self,
        places: tuple[np.ndarray, np.ndarray],
        group: int,
        limit: int,
        on_group: OnGroup | None,
        first: FirstGroups | None,
    ):
        """`places`: from `Engine.places`. `first`: only its groups are handed over."""
        self._held_P, self._own_P = places
        self._on_group, self._first = on_group, first
        self._shape = len(self._held_P), group
        self._missing_P = np.full(len(self._held_P), group)
        num_rows = len(self._held_P) * group
        self._token_BC = np.zeros((num_rows, limit), np.int32)
        self._logp_BC = np.zeros((num_rows, limit), np.float32)
        self._length_B, self._stopped_B = np.zeros(num_rows, np.int32), np.zeros(num_rows, bool)

    def add(self, drawn: Drawn) -> None:
        """Takes finished completions."""
        _, group = self._shape
        for i, row in enumerate(drawn.row_B):
            p, n = int(row) // group, int(drawn.length_B[i])
            self._length_B[row], self._stopped_B[row] = n, drawn.stopped_B[i]
            self._missing_P[p] -= 1
            if self._held_P[p]:
                self._token_BC[row, :n] = drawn.token_BC[i, :n]
                self._logp_BC[row, :n] = drawn.logp_BC[i, :n]
            is_whole = not self._missing_P[p] and (self._first is None or self._first.keeps(p))
            if self._on_group and self._own_P[p] and is_whole:
                whole = range(p * group, (p + 1) * group)
                own = [self._token_BC[r, : self._length_B[r]].tolist() for r in whole]
                self._on_group(p, own)

    def rollouts(self, prompts: Sequence[list[int]], width: int) -> Rollouts:
        """All of them, after prompts that are padded to `width`."""
        prompt_PQ, prompt_length_P = pad_rows(prompts, width)
        by_group = lambda x: x.reshape(*self._shape, *x.shape[1:])  # noqa: E731
        return Rollouts(
            prompt_PQ=prompt_PQ,
            prompt_length_P=prompt_length_P,
            completion_PGC=by_group(self._token_BC),
            logp_PGC=by_group(self._logp_BC),
            length_PG=by_group(self._length_B),
            stopped_PG=by_group(self._stopped_B),
        )
