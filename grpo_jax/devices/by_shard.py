"""Functions that run shard by shard (`shard_map`), and placements of values within a shard."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.devices import sharding


def by_slot_shard(mesh: Mesh, f: Callable, num_whole: int) -> Callable:
    """Runs `f(*whole, *slots)` on each shard of the slots; the results are split by slot too.

    All shards get the first `num_whole` arguments whole. The other arguments and the results are
    split along their first axis. Shards do not communicate, so each may run its loops as often as
    it needs. XLA handles the tensor axis where that splits anything; XLA does not divide a kernel.
    """
    manual = sharding.MESH_AXES if mesh.shape["tensor"] == 1 else sharding.SLOT_AXES
    return _by_hand(mesh, f, num_whole, sharding.SLOT_AXES, manual)


def place_in_slots(mesh: Mesh, x: jax.Array, *, split: bool = False) -> jax.Array:
    """Inside `by_slot_shard`: a value replicated over the shard's devices, or split by row."""
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
    if shards == mesh.size:  # one device per shard: XLA has nothing to divide
        return _by_hand(mesh, f, num_whole, ("data",), sharding.MESH_AXES)

    # vmap: XLA sees one more batch axis. With `shard_map` it aborts (jaxlib 0.10.2) on lookups in a
    # table that is split over two mesh axes while the third is manual.
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
    """The wrapper, with the name of `f`: profiles show the compiled program by it."""
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
    """Inside `by_data_shard`: an activation, sharded as its logical axes say.

    Without this, XLA may leave it split as an embedding is, and send activations in place of
    weights.
    """
    if mesh.shape["data"] == mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.sharding_of(mesh, axes, x.shape))


def by_head_shard(mesh: Mesh, f: Callable, axes: Sequence, out_axes: Sequence) -> Callable:
    """Inside `by_data_shard`: runs `f` on each device's parts of arrays with these logical axes.

    The axes must divide the arrays. If a data shard is one device, nothing is divided.
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
    """Inside `by_data_shard`: a parameter gathered once, so that only `split` still divides it.

    Its gradient is summed into the parameter's own shards. Without this, XLA gathers a parameter
    that a loop reads, and sums its gradient, in every iteration.
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
        # In two steps. In one, XLA gathers the operands of the gradient's product, so that each
        # device computes only its own shard.
        lambda _, grad: (
            jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(grad, placed), kept),
        ),
    )
    return gather(x)
