"""The lanes of packed completions, and how states move between them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from grpo_jax.structs import Array


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Between the entries of rows [R, X, ...] and the lanes [P, L, T, ...] that attention sees."""

    rows: int
    shape: tuple[int, int, int]  # P, L, T
    entry_RY: Array | None = None  # of each place in a row's lanes, Y = P / R * L * T; -1: none
    place_RX: Array | None = None  # of each entry, the inverse. None for both: they are the same

    @staticmethod
    def of(lane_PLT: Array, rows: int, entries: int) -> Lanes:
        if lane_PLT.size == rows * entries:  # an entry is a place
            return Lanes(rows, lane_PLT.shape)
        entry_RY = lane_PLT.reshape(rows, -1)

        def inverse(entry_Y: Array) -> Array:
            at_Y = jnp.where(entry_Y < 0, entries, entry_Y)  # past the end: dropped
            place_Y = jnp.arange(len(entry_Y), dtype=jnp.int32)
            return jnp.full(entries, -1, jnp.int32).at[at_Y].set(place_Y, mode="drop")

        return Lanes(rows, lane_PLT.shape, entry_RY, jax.vmap(inverse)(entry_RY))

    def spread(self, x: Array) -> Array:
        """Entries [R, X, ...] laid out in lanes, zeros where there is none."""
        if self.entry_RY is not None:
            x = _moved(x, self.entry_RY, self.place_RX)
        return x.reshape(*self.shape, *x.shape[2:])

    def gather(self, x: Array) -> Array:
        """The inverse: what stands in lanes by entry [R, X, ...], zeros for empty ones."""
        if self.entry_RY is None:
            return x.reshape(self.rows, -1, *x.shape[3:])
        x = x.reshape(*self.entry_RY.shape, *x.shape[3:])
        return _moved(x, self.place_RX, self.entry_RY)


@jax.custom_vjp
def _moved(x: Array, source: Array, target: Array) -> Array:
    """Entry `source[r, y]` of x [R, X, ...] at y, zeros for -1; `target` is the inverse.

    The gradient moves back by the inverse: of a plain lookup it is a sum into places, which is slow
    everywhere and in no certain order on a GPU.
    """
    if not x.shape[1]:  # completions of one token have no entries
        return jnp.zeros((*source.shape, *x.shape[2:]), x.dtype)
    y = jax.vmap(lambda row, at: row[at])(x, jnp.maximum(source, 0))
    there = (source >= 0).reshape(*source.shape, *(1,) * (x.ndim - 2))
    return jnp.where(there, y, 0)


_moved.defvjp(
    lambda x, source, target: (_moved(x, source, target), (source, target)),
    lambda where, y: (_moved(y, *where[::-1]), None, None),
)
