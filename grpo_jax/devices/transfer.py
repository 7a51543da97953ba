"""Transfers of arrays between the host and the devices, and between shards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from grpo_jax.devices import sharding as sharding_lib

_HOST_MEMORY = "pinned_host"


def shard_owners(mesh: Mesh) -> np.ndarray:
    """The process that owns each shard of the slots: the first that holds it, int [S]."""
    devices_SD = mesh.devices.reshape(sharding_lib.num_slot_shards(mesh), -1)
    return np.array([min(d.process_index for d in devices_D) for devices_D in devices_SD])


def shards_held(mesh: Mesh) -> np.ndarray:
    """True for the slot shards that lie on devices of this process, bool [S]."""
    devices_SD = mesh.devices.reshape(sharding_lib.num_slot_shards(mesh), -1)
    own = jax.process_index()
    return np.array([any(d.process_index == own for d in devices_D) for devices_D in devices_SD])


def shard_rows(mesh: Mesh, tree: Any, axis: str = "rows") -> Any:
    """Global arrays from host arrays, split along their first axis, whose logical axis is given.

    The host arrays have the whole shape on every process, but only the rows that its devices hold
    are read.
    """

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        sharding = sharding_lib.sharding_of(mesh, (axis,) + (None,) * (x.ndim - 1), x.shape)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


@functools.cache
def reordering(mesh: Mesh) -> Callable:
    """The program (tree, order) -> arrays whose row n is row order[n] of the tree.

    The arrays are global and keep their sharding; every process gives the same order.
    """

    @jax.jit
    def reorder(tree: Any, order: jax.Array) -> Any:
        def rows(x: jax.Array) -> jax.Array:
            axes = ("rows",) + (None,) * (x.ndim - 1)
            return jax.lax.with_sharding_constraint(
                x[order], sharding_lib.sharding_of(mesh, axes, x.shape)
            )

        return jax.tree.map(rows, tree)

    return reorder


def select_rows(mesh: Mesh, parts: list[Any], order: np.ndarray) -> Any:
    """Rows of several trees of host arrays, by their numbers when the trees follow each other.

    Each process needs to have, and gets, the rows that its devices hold.
    """
    if jax.process_count() == 1:
        return jax.tree.map(lambda *xs: np.concatenate(xs)[order], *parts)
    return rows_held(_selecting(mesh)([shard_rows(mesh, part) for part in parts], order))


@functools.cache
def _selecting(mesh: Mesh) -> Callable:
    """The program (trees, order) -> global arrays whose row n is row order[n] of all trees."""
    take = reordering(mesh)

    @jax.jit
    def select(parts: list[Any], order: jax.Array) -> Any:
        return take(jax.tree.map(lambda *xs: jax.numpy.concatenate(xs), *parts), order)

    return select


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole on every process, wherever their shards are."""

    def whole(x: jax.Array) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def from_first(tree: Any) -> Any:
    """The host arrays of the first process, on every process; all give the same shapes."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(tree)


def rows_held(tree: Any) -> Any:
    """NumPy arrays of the whole shape, filled in the rows that this process's devices hold.

    Processes do not communicate. The other rows are zero, and take no memory.
    """

    def held(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable:
            return np.asarray(x)
        whole = np.zeros(x.shape, x.dtype)
        for shard in x.addressable_shards:
            whole[shard.index] = shard.data
        return whole

    return jax.tree.map(held, tree)


def check_host_memory(mesh: Mesh, option: str) -> None:
    """Raises ValueError if `option` asks for host memory that the devices cannot reach."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST_MEMORY not in kinds:
        raise ValueError(
            f"{option} = True needs memory of the kind {_HOST_MEMORY}, and {device.device_kind} "
            f"has {', '.join(kinds)}. Set it to False."
        )


def to_host_memory(tree: Any) -> Any:
    """Copies of arrays in the memory of their devices' hosts, with the same sharding."""
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(_HOST_MEMORY)), tree
    )


def to_device_memory(tree: Any) -> Any:
    """Arrays in device memory; those that are not there yet are copied."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), tree)
