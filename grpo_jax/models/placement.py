"""Where activations lie on the devices that share some rows.

Attention is split by head and the MLP by width over the tensor axis. Where the key-value heads do
not divide over it, attention is split by row instead: each device has all heads of rows of its own,
and the rows come together for the MLP and the vocabulary, which stay split by width.
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

    Gather the rows, scatter them back. This one leaves all where it is: attention has all rows too.
    """

    def gather(self, x: Array) -> Array:
        """States by row, [rows, ...], on every device that shares the MLP."""
        return x

    def by_width(self, x: Array) -> Array:
        """What is inside the MLP, [tokens, F], split by width."""
        return x

    def scatter(self, x: Array) -> Array:
        """The inverse of `gather`."""
        return x


REPLICATED = MlpPlacement()


@dataclasses.dataclass(frozen=True)
class MlpOfSlots(MlpPlacement):
    """Around the MLP of decode slots, whose rows of attention the tensor axis splits."""

    mesh: Mesh

    def gather(self, x: Array) -> Array:
        return by_shard.place_in_slots(self.mesh, x)

    def scatter(self, x: Array) -> Array:
        return by_shard.place_in_slots(self.mesh, x, split=True)


@dataclasses.dataclass(frozen=True)
class _MlpOfRows(MlpPlacement):
    """Around the MLP of packed rows, whose rows of attention the tensor axis splits."""

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
    """Where the activations of a data shard's packed rows lie, in scoring and training.

    Token by token they are split by row and along the row, in attention by row and head.
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
        """An activation where its logical axes say."""
        return x if self.mesh is None else by_shard.place_within_shard(self.mesh, x, axes)

    def states(self, x_BTD: Array) -> Array:
        """States by token, between two layers."""
        return self.place(x_BTD, self.row_axis, "tokens", None)

    def embedded(self, x_BTD: Array) -> Array:
        """States as the embedding table is split; else XLA may send all shards' tokens to all."""
        x_BTD = x_BTD if self.by_row else self.place(x_BTD, None, "tokens", "embed")
        return self.mlp.scatter(self.mlp.gather(x_BTD))

    def to_heads(self, x_BTNH: Array) -> Array:
        """Queries, keys or values split along the row, split by head for attention."""
        return self._by_head(self._by_token(x_BTNH))

    def to_tokens(self, x_BTNH: Array) -> Array:
        """The inverse, of what attention gives."""
        return self._by_token(self._by_head(x_BTNH))

    def gathered(self, params: Params, axes: Params) -> Params:
        """Parameters that a layer reads, which devices with rows of their own each read whole.

        XLA would send activations in place of the weights, which it is therefore told to gather.
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
