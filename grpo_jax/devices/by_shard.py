"""Functions and values by shard: what `shard_map` divides, and what each shard has."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.devices import sharding


def by_slot_shard(mesh: Mesh, f: Callable, num_whole: int) -> Callable:
    """`f(*whole, *slots)` on every shard of the slots by itself; its results are split by slot too.

    The first `num_whole` arguments are given to all shards, the others and the results are split
    along their first axis. Nothing passes between the shards, so each may run its loops as often as
    it needs. The tensor axis is left to XLA, where it splits anything: it divides no kernel.
    """
    manual = sharding.MESH_AXES if mesh.shape["tensor"] == 1 else sharding.SLOT_AXES
    return _by_hand(mesh, f, num_whole, sharding.SLOT_AXES, manual)


def place_in_slots(mesh: Mesh, x: jax.Array, *, split: bool = False) -> jax.Array:
    """Inside `by_slot_shard`: the same on every device of the shard, or split by row over them."""
    if mesh.shape["tensor"] == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec("tensor") if split else PartitionSpec()
    )


def by_data_shard(mesh: Mesh, f: Callable, num_whole: int) -> Callable:
    """As `by_slot_shard` for the data axis alone: parameters may be split inside a shard.

    Loops must run equally often in all shards.
    """
    shards = mesh.shape["data"]
    if shards == 1:
        return f
    if shards == mesh.size:  # a device each: nothing is left for XLA to divide
        return _by_hand(mesh, f, num_whole, ("data",), sharding.MESH_AXES)

    # XLA sees one more batch axis. It aborts (jaxlib 0.10.2) on lookups in a table that is split
    # over two mesh axes where the third is handled by hand.
    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(shards, x.shape[0] // shards, *x.shape[1:])
        spec = PartitionSpec("data", *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def sharded(*args):
        whole, rows = args[:num_whole], jax.tree.map(split, args[num_whole:])
        out = jax.vmap(functools.partial(f, *whole), spmd_axis_name="data")(*rows)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return _called_as(f, sharded)


def _by_hand(
    mesh: Mesh, f: Callable, num_whole: int, axes: tuple[str, ...], manual: tuple[str, ...]
) -> Callable:
    def sharded(*args):
        rows = PartitionSpec(axes)
        specs = (PartitionSpec(),) * num_whole + (rows,) * (len(args) - num_whole)
        return jax.shard_map(
            f, mesh=mesh, in_specs=specs, out_specs=rows, axis_names=set(manual), check_vma=False
        )(*args)

    return _called_as(f, sharded)


def _called_as(f: Callable, wrapper: Callable) -> Callable:
    """The wrapper under the name of `f`, by which profiles show the compiled program."""
    while isinstance(f, functools.partial):
        f = f.func
    wrapper.__name__ = f.__name__
    return wrapper


def split_within_shard(mesh: Mesh, tree: Any, axis: str = "shard_rows") -> Any:
    """Inside `by_data_shard`: the rows split over the devices of the shard."""
    if math.prod(mesh.shape[name] for name in sharding.LOGICAL_AXES[axis]) == 1:
        return tree
    placed = NamedSharding(mesh, PartitionSpec(sharding.LOGICAL_AXES[axis]))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, placed), tree)


def place_within_shard(mesh: Mesh, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Inside `by_data_shard`: an activation where its logical axes say.

    Else XLA may leave them split as an embedding is, and send activations in place of weights.
    """
    if mesh.shape["data"] == mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.sharding_of(mesh, axes, x.shape))


def by_head_shard(mesh: Mesh, f: Callable, axes: Sequence, out_axes: Sequence) -> Callable:
    """Inside `by_data_shard`: `f` of each device's parts of arrays with these logical axes.

    The axes must divide the arrays. Where a data shard is a device, there is nothing to divide.
    """
    if mesh.shape["data"] == mesh.size:
        return f
    specs, out_specs = (
        tuple(PartitionSpec(*sharding.mesh_axes(names)) for names in of) for of in (axes, out_axes)
    )
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)


def gathered(
    mesh: Mesh, x: jax.Array, axes: tuple[str | None, ...], split: tuple[str, ...]
) -> jax.Array:
    """Inside `by_data_shard`: a parameter split along `split` alone, once for what follows.

    Its gradient is summed into the shards that the parameter is kept in. Where a loop reads a
    parameter, XLA otherwise gathers it, and sums its gradient, in every iteration.
    """
    kept = sharding.sharding_of(mesh, axes, x.shape)
    placed = sharding.sharding_of(mesh, tuple(a if a in split else None for a in axes), x.shape)
    if placed.is_equivalent_to(kept, x.ndim):
        return x

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, placed)

    gather.defvjp(
        lambda x: (gather(x), None),
        # In two steps, or XLA gathers what it is a product of to compute its shards alone.
        lambda _, grad: (
            jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(grad, placed), kept),
        ),
    )
    return gather(x)
