"""The device mesh, and the one table from logical axes to mesh axes.

Parameters and activations name logical axes ("embed", "heads", "rows"); only this file knows mesh
axes. A mesh axis that does not divide a dimension does not split it, so small models run on any
mesh, replicated where necessary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
ROW_AXES = ("data", "fsdp")  # the mesh axes that split a batch
SLOT_AXES = (*ROW_AXES, "sequence")  # the mesh axes that split samples; they do not divide a row

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
    # Activations of one data shard in scoring and update. They are split along the row, and by head
    # in attention, with an all-to-all between the two (Jacobs et al. 2023, arXiv:2309.14509).
    "shard_rows": ("fsdp",),
    "tokens": ("sequence",),
    # If the key-value heads do not split over tensor, all but MLP and vocabulary is split by row.
    "attention_rows": ("fsdp", "tensor"),
    "attention_slots": (*SLOT_AXES, "tensor"),
    "attention_heads": ("tensor", "sequence"),
}


def is_gpu(mesh: Mesh) -> bool:
    """Whether the mesh's devices are GPUs."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, or over `devices`; one size may be -1, "the rest".

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
    # A mesh axis may take a part of a dimension of a TPU's torus: 8 x 8 on 4 x 4 x 4.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    mesh = Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    for devices_SD in mesh.devices.reshape(-1, *mesh.devices.shape[2:]):
        processes = {device.process_index for device in devices_SD.flat}
        # These devices sample different rows, but score each row together.
        if sizes["sequence"] > 1 and len(processes) > 1:
            raise ValueError(
                f"mesh.sequence = {sizes['sequence']} and mesh.tensor = {sizes['tensor']} split "
                f"one row over devices of {len(processes)} processes. Their product must divide "
                "the number of devices of a process."
            )
    return mesh


def num_row_shards(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[name] for name in ROW_AXES)


def num_slot_shards(mesh: Mesh) -> int:
    """The number of parts that the slots of an engine are split into."""
    return math.prod(mesh.shape[name] for name in SLOT_AXES)


def sharding_of(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes (None: replicated).

    If several dimensions name a mesh axis, it splits the first of them.
    """
    spec = []
    for candidates, size in zip(mesh_axes(axes), shape, strict=True):
        names = []
        for name in candidates:
            if size % (math.prod(mesh.shape[n] for n in names) * mesh.shape[name]) == 0:
                names.append(name)
        spec.append(tuple(names) if names else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def mesh_axes(axes: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension, without those that an earlier dimension has taken."""
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


def num_shards_of(mesh: Mesh, axis: str, size: int) -> int:
    """The number of parts that a dimension of this logical axis and size is split into."""
    return size // sharding_of(mesh, (axis,), (size,)).shard_shape((size,))[0]


def attention_parts(mesh: Mesh, num_kv_heads: int) -> int:
    """The number of parts that the tensor axis splits the rows of attention into.

    It is more than 1 if the key-value heads do not split over the tensor axis: each device then has
    all heads of its rows. Parts of heads would have to be sent between devices.
    """
    tensor = mesh.shape["tensor"]
    return tensor if num_kv_heads % tensor and mesh.shape["sequence"] == 1 else 1


def row_axis(mesh: Mesh, num_kv_heads: int) -> str:
    """The logical axis of the rows that a data shard scores."""
    return "attention_rows" if attention_parts(mesh, num_kv_heads) > 1 else "shard_rows"


def num_head_shards(mesh: Mesh) -> int:
    """The number of parts that attention's heads are split into in scoring and update."""
    return math.prod(mesh.shape[name] for name in LOGICAL_AXES["attention_heads"])


def zero1_sharding(mesh: Mesh, placed: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`placed`, also split over the data and sequence axes, along the first dimensions they divide.

    For arrays that are read once per update, as the optimizer's moments: each shard keeps and
    computes its part (Rajbhandari et al. 2020, arXiv:1910.02054, stage 1).
    """
    spec = [names if isinstance(names, tuple) else (names,) * bool(names) for names in placed.spec]
    spec += [()] * (len(shape) - len(spec))
    for axis in ("data", "sequence"):
        for i, size in enumerate(shape):
            if size % math.prod(mesh.shape[name] for name in (*spec[i], axis)) == 0:
                spec[i] = (*spec[i], axis)
                break
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))


def like_parameter(mesh: Mesh, placed: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`placed` for an array of the same axes and other sizes; replicated if they do not divide."""
    spec = list(placed.spec) + [None] * (len(shape) - len(placed.spec))
    for i, (names, size) in enumerate(zip(spec, shape, strict=True)):
        names = names if isinstance(names, tuple) else (names,) * (names is not None)
        if size % math.prod(mesh.shape[name] for name in names):
            spec[i] = None
    return NamedSharding(mesh, PartitionSpec(*spec))


def stacked(mesh: Mesh, sharding: NamedSharding) -> NamedSharding:
    """The sharding of such arrays stacked, one for each data shard, [shards, ...]."""
    return NamedSharding(mesh, PartitionSpec("data", *sharding.spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
