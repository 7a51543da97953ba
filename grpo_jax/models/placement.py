"""The sharding of activations on devices that share rows.

Attention is split by head and the MLP by width over the tensor axis. If the key-value heads do not
divide over it, attention is split by row instead: each device has all heads of its own rows. The
rows are gathered for the MLP and the vocabulary, which stay split by width.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from grpo_jax.devices import by_shard, sharding
from grpo_jax.structs import Array, Params


@dataclasses.dataclass(frozen=True)
class MlpPlacement:
    """Placements around an MLP that is split by width while attention is split by row.

    Gather the rows, scatter them back. This base class moves nothing: attention has all rows too.
    """

    def gather(self, x: Array) -> Array:
        """States by row, [rows, ...], on every device that shares the MLP."""
        return x

    def by_width(self, x: Array) -> Array:
        """Activations inside the MLP, [tokens, F], split by width."""
        return x

    def scatter(self, x: Array) -> Array:
        """The inverse of `gather`."""
        return x


REPLICATED = MlpPlacement()


@dataclasses.dataclass(frozen=True)
class MlpOfSlots(MlpPlacement):
    """Placements around the MLP of decode slots, whose attention rows the tensor axis splits."""

    mesh: Mesh

    def gather(self, x: Array) -> Array:
        return by_shard.place_in_slots(self.mesh, x)

    def scatter(self, x: Array) -> Array:
        return by_shard.place_in_slots(self.mesh, x, split=True)


@dataclasses.dataclass(frozen=True)
class _MlpOfRows(MlpPlacement):
    """Placements around the MLP of packed rows, whose attention rows the tensor axis splits."""

    mesh: Mesh

    def gather(self, x: Array) -> Array:
        return self._place(x, "shard_rows")

    def by_width(self, x: Array) -> Array:
        return by_shard.place_within_shard(self.mesh, x, ("shard_rows", "mlp"))

    def scatter(self, x: Array) -> Array:
        return self._place(x, "attention_rows")

    def _place(self, x: Array, axis: str) -> Array:
        return by_shard.place_within_shard(self.mesh, x, (axis,) + (None,) * (x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of the activations of a data shard's packed rows, in scoring and training.

    In token-wise layers they are split by row and along the row, in attention by row and head.
    """

    mesh: Mesh | None = None  # None: one device, nothing to place
    by_row: bool = False  # attention is split by row over the tensor axis, not by head

    @staticmethod
    def of(mesh: Mesh, num_kv_heads: int) -> Placement:
        return Placement(mesh, sharding.attention_parts(mesh, num_kv_heads) > 1)

    @property
    def row_axis(self) -> str:
        """The logical axis of the rows outside the MLP."""
        return "attention_rows" if self.by_row else "shard_rows"

    @property
    def mlp(self) -> MlpPlacement:
        return _MlpOfRows(self.mesh) if self.by_row else REPLICATED

    def place(self, x: Array, *axes: str | None) -> Array:
        """An activation sharded by its logical axes."""
        return x if self.mesh is None else by_shard.place_within_shard(self.mesh, x, axes)

    def states(self, x_BTD: Array) -> Array:
        """States [B, T, D] as they are sharded between two layers."""
        return self.place(x_BTD, self.row_axis, "tokens", None)

    def embedded(self, x_BTD: Array) -> Array:
        """States, first split like the embedding; else XLA may send all tokens to all shards."""
        x_BTD = x_BTD if self.by_row else self.place(x_BTD, None, "tokens", "embed")
        return self.mlp.scatter(self.mlp.gather(x_BTD))

    def to_heads(self, x_BTNH: Array) -> Array:
        """Queries, keys or values, from a split along the row to a split by head for attention."""
        return self._by_head(self._by_token(x_BTNH))

    def to_tokens(self, x_BTNH: Array) -> Array:
        """The inverse, for attention's output."""
        return self._by_token(self._by_head(x_BTNH))

    def gathered(self, params: Params, axes: Params) -> Params:
        """A layer's parameters, gathered on devices that have their own attention rows.

        This makes XLA gather the weights; by itself it would send activations instead.
        """
        if not self.by_row:
            return params
        gather = lambda x, names: by_shard.gathered(self.mesh, x, names, ("mlp", "vocab"))  # noqa: E731
        return jax.tree.map(gather, params, axes)

    def _by_token(self, x: Array) -> Array:
        return self.place(x, self.row_axis, "tokens", "heads", None)

    def _by_head(self, x: Array) -> Array:
        return self.place(x, self.row_axis, None, "attention_heads", None)


ONE_DEVICE = Placement()
