"""Packed rows: the decoder's inputs, and the moves between entries and attention lanes.

A row holds the prompts of several groups and then entries. An entry reads one token of a completion
and predicts the next. Attention needs to know which entries belong together: every prompt has
several lanes of equal width, and a lane holds one or more completions. Kernels that find by
themselves what a query sees read the row as it is: it has no lanes then. Axes beside those of
`structs.py`:

    X entries of a row         Y places in the lanes of a row, P / B * W * T
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.kernels.attention import Seen
from grpo_jax.kernels.primitives import rows_of_each, split_index, take_along, where
from grpo_jax.structs import Array

# (token_BX, lane_PWT) of `learner/packing.py`. token_BX: the completion token that each entry
# predicts, (j * G + g) * C + c in its row. lane_PWT: the entry at each lane place. -1: none. Rows
# without lanes have W = 0.
Layout = tuple[Array, Array]


def identity_layout(prompts: int, group: int, tokens: int) -> Layout:
    """The layout with one row for each prompt and one lane for each completion, without gaps."""
    token_GT = np.arange(group)[:, None] * tokens + np.arange(1, tokens)
    entry_GT = np.arange(token_GT.size).reshape(token_GT.shape)
    return (
        jnp.broadcast_to(token_GT.reshape(1, -1), (prompts, token_GT.size)),
        jnp.broadcast_to(entry_GT[None], (prompts, *entry_GT.shape)),
    )


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Moves values between the entries of rows [B, X, ...] and attention lanes [P, W, T, ...]."""

    rows: int
    shape: tuple[int, int, int]  # P, W, T
    entry_BY: Array | None = None  # entry of each place; -1: none
    place_BX: Array | None = None  # the inverse. Both None: entries are places

    @staticmethod
    def of(lane_PWT: Array, rows: int, entries: int) -> Lanes:
        if lane_PWT.size == rows * entries:  # entries are places
            return Lanes(rows, lane_PWT.shape)
        entry_BY = lane_PWT.reshape(rows, -1)

        def inverse(entry_Y: Array) -> Array:
            at_Y = where(entry_Y < 0, entries, entry_Y)  # past the end: dropped
            place_Y = jnp.arange(len(entry_Y), dtype=jnp.int32)
            return jnp.full(entries, -1, jnp.int32).at[at_Y].set(place_Y, mode="drop")

        return Lanes(rows, lane_PWT.shape, entry_BY, jax.vmap(inverse)(entry_BY))

    def spread(self, x: Array) -> Array:
        """Entries [B, X, ...] moved to lanes; zeros at empty places."""
        if self.entry_BY is not None:
            x = _moved(x, self.entry_BY, self.place_BX)
        return x.reshape(*self.shape, *x.shape[2:])

    def gather(self, x: Array) -> Array:
        """The inverse: lane values by entry [B, X, ...]; zeros for empty entries."""
        if self.entry_BY is None:
            return x.reshape(self.rows, -1, *x.shape[3:])
        x = x.reshape(*self.entry_BY.shape, *x.shape[3:])
        return _moved(x, self.place_BX, self.entry_BY)


@dataclasses.dataclass(frozen=True)
class PackedInputs:
    """The decoder's inputs by packed row [B, T]: prompts of T - X tokens, then X entries."""

    ids_BT: Array  # int32
    position_BT: Array  # int32: in the text, its prompt included
    prompt_length_P: Array
    prompt_tokens: int  # Q: padded; 0: no prompts, first tokens are not predicted
    group: int  # G
    lanes: Lanes | None  # None: the rows have none, and attention reads `seen`
    segment_PWT: Array | None  # int32: equal for tokens of one part of a completion; 0: none
    position_PWT: Array | None  # int32: in the part
    token_BX: Array  # int32: as in `Layout`
    position_BX: Array  # int32: in the part, of the token that an entry reads
    completion_tokens: int  # C

    @staticmethod
    def of(
        prompt_PQ: Array,
        prompt_length_P: Array,
        completion_PGC: Array,
        layout: Layout | None = None,
        begin_PGC: Array | None = None,
    ) -> PackedInputs:
        """Packs right-padded prompts and completions by a layout; None: the identity layout.

        All rows have equally many prompts, in order. `begin_PGC`: as in `Rollouts`. The token
        before a part seems to predict the part's first one, which is never an action.
        """
        num_prompts, group, tokens = completion_PGC.shape
        token_BX, lane_PWT = layout or identity_layout(num_prompts, group, tokens)
        lanes = Lanes.of(lane_PWT, *token_BX.shape) if lane_PWT.shape[1] else None
        rows = token_BX.shape[0]
        by_row = lambda x: x.reshape(rows, x.size // rows)  # noqa: E731
        read_BX = jnp.maximum(token_BX - 1, 0)  # an entry reads the token before
        input_BX = take_along(by_row(completion_PGC), read_BX)
        text_BX, position_BX = split_index(read_BX, tokens)
        length_BX = take_along(by_row(prompt_length_P), split_index(text_BX, group)[0])
        text_BX += 1
        if begin_PGC is not None:
            position_BX -= take_along(by_row(begin_PGC), read_BX)
            text_BX = read_BX - position_BX + 1  # a part is known by its first token
        position_PQ = jnp.broadcast_to(jnp.arange(prompt_PQ.shape[1]), prompt_PQ.shape)
        return PackedInputs(
            ids_BT=jnp.concatenate([by_row(prompt_PQ), input_BX], axis=1),
            position_BT=jnp.concatenate([by_row(position_PQ), length_BX + position_BX], axis=1),
            prompt_length_P=prompt_length_P,
            prompt_tokens=prompt_PQ.shape[1],
            group=group,
            lanes=lanes,
            segment_PWT=lanes and lanes.spread(text_BX),
            position_PWT=lanes and lanes.spread(position_BX),
            token_BX=token_BX,
            position_BX=position_BX,
            completion_tokens=tokens,
        )

    def seen(self, window: int | None) -> Seen:
        """The keys of its row [B, T] that each token sees, for layers with this window."""
        rows, tokens = self.ids_BT.shape
        at_T = jnp.arange(tokens, dtype=jnp.int32)
        at_X = at_T[tokens - self.num_entries :]
        read_BX = jnp.maximum(self.token_BX - 1, 0)
        there_BX = self.token_BX >= 0
        begin_BX = where(there_BX, at_X[None] - self.position_BX, at_X[None])
        in_prompts = tokens - self.num_entries
        prompt_T, _ = split_index(at_T[:in_prompts], max(self.prompt_tokens, 1))
        at_prompts = prompt_T * self.prompt_tokens
        begin = jnp.broadcast_to(at_prompts, (rows, in_prompts)), begin_BX
        begin_BT = jnp.concatenate(begin, axis=1)
        if window is not None:
            begin_BT = jnp.maximum(begin_BT, at_T[None] - window + 1)
        if not in_prompts:
            return Seen(begin_BT)
        prompt_BX, _ = split_index(read_BX, self.group * self.completion_tokens)
        length_BX = take_along(self.prompt_length_P.reshape(rows, -1), prompt_BX)
        first_BX = prompt_BX * self.prompt_tokens
        end_BX = where(there_BX, first_BX + length_BX, 0)
        if window is not None:
            first_BX += jnp.maximum(self.position_BT[:, in_prompts:] - window + 1, 0)
        none = jnp.zeros((rows, in_prompts), jnp.int32)
        of_prompt = (jnp.concatenate([none, x], axis=1) for x in (first_BX, end_BX))
        return Seen(begin_BT, *of_prompt)

    @property
    def num_entries(self) -> int:
        """X."""
        rows, prompts = self.ids_BT.shape[0], self.prompt_length_P.shape[0]
        return self.ids_BT.shape[1] - prompts // rows * self.prompt_tokens

    def prompts(self, x: Array) -> Array:
        """The prompts' part of states by row [B, T, ...], as [P, Q, ...]."""
        x = x[:, : x.shape[1] - self.num_entries]
        return x.reshape(len(self.prompt_length_P), self.prompt_tokens, *x.shape[2:])

    def entries(self, x: Array) -> Array:
        """The entries' part of states by row [B, T, ...], as [B, X, ...]."""
        return x[:, x.shape[1] - self.num_entries :]

    def rows(self, prompts: Array, entries: Array | None) -> Array:
        """The inverse: joins [P, Q, ...] and [B, X, ...] (None if X is 0) to [B, T, ...]."""
        prompts = prompts.reshape(self.ids_BT.shape[0], -1, *prompts.shape[2:])
        return prompts if entries is None else jnp.concatenate([prompts, entries], axis=1)

    def predictors(self, x_BTD: Array) -> Array:
        """The states that predict completions' tokens, [B, J * G + X, D] for B rows of J prompts.

        First the prompts' last states, which predict each completion's first token; then the
        entries' states.
        """
        if not self.prompt_tokens:
            nothing = (x_BTD.shape[0], self.group * len(self.prompt_length_P) // x_BTD.shape[0])
            first = jnp.zeros((*nothing, x_BTD.shape[2]), x_BTD.dtype)
            return jnp.concatenate([first, x_BTD], axis=1)
        x_PQD = self.prompts(x_BTD)
        last_PD = rows_of_each(x_PQD, self.prompt_length_P - 1)
        first_PGD = jnp.broadcast_to(
            last_PD[:, None], (last_PD.shape[0], self.group, last_PD.shape[1])
        )
        first = first_PGD.reshape(x_BTD.shape[0], -1, x_BTD.shape[2])
        return jnp.concatenate([first, self.entries(x_BTD)], axis=1)

    def by_completion(self, states: Array) -> Array:
        """`predictors` of the identity layout as [P, G, C, D]: entry c predicts token c."""
        first, rest = states[:, : self.group, None], states[:, self.group :]
        rest = rest.reshape(*first.shape[:2], self.num_entries // self.group, states.shape[2])
        return jnp.concatenate([first, rest], axis=2)


@jax.custom_vjp
def _moved(x: Array, source: Array, target: Array) -> Array:
    """Entry `source[r, y]` of x [B, X, ...] at y, zeros for -1; `target` is the inverse.

    The gradient is a lookup by the inverse. The gradient of a plain lookup would be a scatter-add,
    which is slow everywhere and has no fixed order on a GPU.
    """
    if not x.shape[1]:  # completions of one token have no entries
        return jnp.zeros((*source.shape, *x.shape[2:]), x.dtype)
    y = rows_of_each(x, jnp.maximum(source, 0))
    there = (source >= 0).reshape(*source.shape, *(1,) * (x.ndim - 2))
    return where(there, y, 0)


_moved.defvjp(
    lambda x, source, target: (_moved(x, source, target), (source, target)),
    lambda where, y: (_moved(y, *where[::-1]), None, None),
)
