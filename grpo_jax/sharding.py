"""The device mesh, and the one table from logical axes to mesh axes.

Parameters and activations name logical axes ("embed", "heads", "rows"); only this file knows mesh
axes. A mesh axis that does not divide a dimension is left out for it, so small models run on any
mesh, replicated where they must be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
ROW_AXES = ("data", "fsdp")  # the mesh axes that split a batch
SLOT_AXES = (*ROW_AXES, "sequence")  # those that split what is sampled, where no row is divided
_HOST_MEMORY = "pinned_host"

# Logical axis → the mesh axes that split it, in the order they are tried.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "rows": ROW_AXES,  # prompts: whole groups
    "slots": SLOT_AXES,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    # Activations of one data shard in scoring and update. All-to-all between the two: token by
    # token they are split along the row, in attention by head (Jacobs et al. 2023,
    # arXiv:2309.14509).
    "shard_rows": ("fsdp",),
    "tokens": ("sequence",),
    # Where the key-value heads do not split over tensor, all but MLP and vocabulary splits by row.
    "attention_rows": ("fsdp", "tensor"),
    "attention_slots": (*SLOT_AXES, "tensor"),
    "attention_heads": ("tensor", "sequence"),
}


def is_gpu(mesh: Mesh) -> bool:
    """Whether its devices are GPUs."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, or those given; one size may be -1, "the rest".

    Raises ValueError when the sizes do not multiply to the number of devices, or a sequence would
    be split over processes.
    """
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        shape = " * ".join(f"mesh.{name} = {size}" for name, size in sizes.items())
        raise ValueError(
            f"{shape} does not use the {len(devices)} devices there are. Make the product "
            f"{len(devices)}, or set one of them to -1 for the rest."
        )
    # Auto axes: with explicit ones, the default of make_mesh, an embedding lookup sharded on two
    # axes is refused.
    # An axis may be a part of a dimension of a TPU's torus, 8 x 8 of 4 x 4 x 4.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    mesh = Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    for devices_SD in mesh.devices.reshape(-1, *mesh.devices.shape[2:]):
        processes = {device.process_index for device in devices_SD.flat}
        if sizes["sequence"] > 1 and len(processes) > 1:  # rows are sampled apart, scored together
            raise ValueError(
                f"mesh.sequence = {sizes['sequence']} and mesh.tensor = {sizes['tensor']} put "
                f"devices of {len(processes)} processes to one row. Make their product a divisor "
                "of the devices of a process."
            )
    return mesh


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in ROW_AXES)


def num_slot_shards(mesh: Mesh) -> int:
    """Into how many parts the slots of an engine are split."""
    return math.prod(mesh.shape[name] for name in SLOT_AXES)


def sharding_of(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes (None: replicated).

    A mesh axis splits the first of the dimensions that name it.
    """
    spec = []
    for candidates, size in zip(_mesh_axes(axes), shape, strict=True):
        names = []
        for name in candidates:
            if size % (math.prod(mesh.shape[n] for n in names) * mesh.shape[name]) == 0:
                names.append(name)
        spec.append(tuple(names) if names else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _mesh_axes(axes: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension, without those of a dimension before it."""
    found: list[tuple[str, ...]] = []
    for axis in axes:
        used = {name for names in found for name in names}
        found.append(tuple(n for n in LOGICAL_AXES[axis] if n not in used) if axis else ())
    return found


def tree_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings of a pytree from its logical axes (tuples at the leaves) and shapes."""
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda names, leaf: sharding_of(mesh, names, leaf.shape), axes, shapes, is_leaf=is_axes
    )


def by_slot_shard(mesh: Mesh, f: Callable, num_whole: int) -> Callable:
    """`f(*whole, *slots)` on every shard of the slots by itself; its results are split by slot too.

    The first `num_whole` arguments are given to all shards, the others and the results are split
    along their first axis. Nothing passes between the shards, so each may run its loops as often as
    it needs. The tensor axis is left to XLA, where it splits anything: it divides no kernel.
    """
    manual = MESH_AXES if mesh.shape["tensor"] == 1 else SLOT_AXES
    return _by_hand(mesh, f, num_whole, SLOT_AXES, manual)


def num_shards_of(mesh: Mesh, axis: str, size: int) -> int:
    """Into how many parts a dimension of this logical axis and size is split."""
    return size // sharding_of(mesh, (axis,), (size,)).shard_shape((size,))[0]


def attention_parts(mesh: Mesh, num_kv_heads: int) -> int:
    """Into how many parts devices that share the MLP split the rows of attention.

    Those of the tensor axis do where the key-value heads do not split over them: each then has all
    heads of its rows, in place of parts of heads, which would have to be sent about.
    """
    tensor = mesh.shape["tensor"]
    return tensor if num_kv_heads % tensor and mesh.shape["sequence"] == 1 else 1


def row_axis(mesh: Mesh, num_kv_heads: int) -> str:
    """The logical axis of the rows that a data shard scores."""
    return "attention_rows" if attention_parts(mesh, num_kv_heads) > 1 else "shard_rows"


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
        return _by_hand(mesh, f, num_whole, ("data",), MESH_AXES)

    # XLA sees one more batch axis. It aborts (jaxlib 0.10.2) on lookups in a table that is split
    # over two mesh axes where the third is handled by hand.
    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(shards, -1, *x.shape[1:])
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
    if math.prod(mesh.shape[name] for name in LOGICAL_AXES[axis]) == 1:
        return tree
    placed = NamedSharding(mesh, PartitionSpec(LOGICAL_AXES[axis]))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, placed), tree)


def place_within_shard(mesh: Mesh, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Inside `by_data_shard`: an activation where its logical axes say.

    Else XLA may leave them split as an embedding is, and send activations in place of weights.
    """
    if mesh.shape["data"] == mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_of(mesh, axes, x.shape))


def num_head_shards(mesh: Mesh) -> int:
    """Into how many parts the heads of attention in scoring and update are split."""
    return math.prod(mesh.shape[name] for name in LOGICAL_AXES["attention_heads"])


def by_head_shard(mesh: Mesh, f: Callable, axes: Sequence, out_axes: Sequence) -> Callable:
    """Inside `by_data_shard`: `f` of each device's parts of arrays with these logical axes.

    The axes must divide the arrays. Where a data shard is a device, there is nothing to divide.
    """
    if mesh.shape["data"] == mesh.size:
        return f
    specs, out_specs = (
        tuple(PartitionSpec(*_mesh_axes(names)) for names in of) for of in (axes, out_axes)
    )
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)


def gathered(
    mesh: Mesh, x: jax.Array, axes: tuple[str | None, ...], split: tuple[str, ...]
) -> jax.Array:
    """Inside `by_data_shard`: a parameter split along `split` alone, once for what follows.

    Its gradient is summed into the shards that the parameter is kept in. Where a loop reads a
    parameter, XLA otherwise gathers it, and sums its gradient, in every iteration.
    """
    kept = sharding_of(mesh, axes, x.shape)
    placed = sharding_of(mesh, tuple(a if a in split else None for a in axes), x.shape)
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


def shard_owners(mesh: Mesh) -> np.ndarray:
    """The process that answers for each shard of the slots, the first that holds it, int [S]."""
    devices_SD = mesh.devices.reshape(num_slot_shards(mesh), -1)
    return np.array([min(d.process_index for d in devices_D) for devices_D in devices_SD])


def shards_held(mesh: Mesh) -> np.ndarray:
    """Which shards of the slots lie on devices of this process, bool [S]."""
    devices_SD = mesh.devices.reshape(num_slot_shards(mesh), -1)
    own = jax.process_index()
    return np.array([any(d.process_index == own for d in devices_D) for devices_D in devices_SD])


def shard_rows(mesh: Mesh, tree: Any, axis: str = "rows") -> Any:
    """Host arrays as global arrays, split along their first axis, which is of that logical kind.

    They have their whole shape on every process, but only the rows that its devices hold are read.
    """

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        sharding = sharding_of(mesh, (axis,) + (None,) * (x.ndim - 1), x.shape)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def reorder_rows(mesh: Mesh, tree: Any, order: np.ndarray) -> Any:
    """Arrays whose row n is row order[n] of the given global arrays, split over the mesh alike."""
    return _reordering(mesh)(tree, order)


@functools.cache
def _reordering(mesh: Mesh) -> Callable:
    @jax.jit
    def reorder(tree: Any, order: jax.Array) -> Any:
        def rows(x: jax.Array) -> jax.Array:
            axes = ("rows",) + (None,) * (x.ndim - 1)
            return jax.lax.with_sharding_constraint(x[order], sharding_of(mesh, axes, x.shape))

        return jax.tree.map(rows, tree)

    return reorder


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole on every process, wherever their shards are."""

    def whole(x: jax.Array) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def rows_held(tree: Any) -> Any:
    """Arrays as NumPy arrays of their whole shape, with the rows that this process's devices hold.

    Nothing is moved between processes. The other rows are zero, and take no memory.
    """

    def held(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable:
            return np.asarray(x)
        whole = np.zeros(x.shape, x.dtype)
        for shard in x.addressable_shards:
            whole[shard.index] = shard.data
        return whole

    return jax.tree.map(held, tree)


def spread(mesh: Mesh, placed: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`placed`, split over the data and sequence axes too, along the first dimensions they divide.

    For what is read once an update, as the optimizer's moments are: each shard keeps and computes
    its part (Rajbhandari et al. 2020, arXiv:1910.02054, stage 1).
    """
    spec = [names if isinstance(names, tuple) else (names,) * bool(names) for names in placed.spec]
    spec += [()] * (len(shape) - len(spec))
    for axis in ("data", "sequence"):
        for i, size in enumerate(shape):
            if size % math.prod(mesh.shape[name] for name in (*spec[i], axis)) == 0:
                spec[i] = (*spec[i], axis)
                break
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))


def check_host_memory(mesh: Mesh, option: str) -> None:
    """Raises ValueError when the devices reach no memory of their host, which `option` asks for."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST_MEMORY not in kinds:
        raise ValueError(
            f"{option} = True needs memory of the kind {_HOST_MEMORY}, and {device.device_kind} "
            f"has {', '.join(kinds)}. Set it to False."
        )


def to_host_memory(tree: Any) -> Any:
    """Copies of arrays in the memory of their devices' host, split there as they are."""
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(_HOST_MEMORY)), tree
    )


def to_device_memory(tree: Any) -> Any:
    """Arrays in the memory of their devices: those that are there already, copies of others."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), tree)


def along(mesh: Mesh, placed: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`placed` for an array of the same axes and other sizes, whole where it does not divide."""
    spec = list(placed.spec) + [None] * (len(shape) - len(placed.spec))
    for i, (names, size) in enumerate(zip(spec, shape, strict=True)):
        names = names if isinstance(names, tuple) else (names,) * (names is not None)
        if size % math.prod(mesh.shape[name] for name in names):
            spec[i] = None
    return NamedSharding(mesh, PartitionSpec(*spec))


def stacked(mesh: Mesh, sharding: NamedSharding) -> NamedSharding:
    """The sharding of one such array for each data shard, [shards, ...]."""
    return NamedSharding(mesh, PartitionSpec("data", *sharding.spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
