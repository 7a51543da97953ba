"""Changes to Orbax's internals that the checkpoints need."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import path as ocp_path

from grpo_jax.run import checksums, integrity


def sealing(folder: epath.Path) -> type:
    """Orbax's class for temporary checkpoint folders, with checksums written before the final name.

    They are written in the writing thread of process 0, after all processes have written.
    """

    class Sealing(ocp_path.atomicity_defaults.get_default_temporary_path_class(folder)):
        async def finalize(self) -> None:
            # Orbax calls this for each item first; items have no such store. The store writes the
            # time of the end, Orbax's last change of a file. So it must be written before the
            # checksums.
            store, self._checkpoint_metadata_store = self._checkpoint_metadata_store, None
            if store is not None:
                store.wait_until_finished()
                metadata = self.get() / "_CHECKPOINT_METADATA"
                store.update(metadata, commit_timestamp_nsecs=time.time_ns())
                store.wait_until_finished()
                lacking = integrity.unmerged(self.get())
                if lacking:
                    raise OSError(f"its arrays were not written whole: {'; '.join(lacking)}")
                checksums.write(self.get(), leave_out=integrity.WRITTEN_LAST)
            await super().finalize()

    return Sealing


def ask_for_no_metrics() -> None:
    """Turns off Orbax's log of TensorStore's speed, which reads metrics that are never freed.

    TensorStore 0.1.86 keeps each list of metrics that it gives to Python: 16 kB and more per save.
    """
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src.serialization import tensorstore_utils

        if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
            tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0  # none: not logged


def write_arrays_whole() -> None:
    """In a single process, lets one device write a replicated array whole.

    By default each copy writes a part, cut out by its own compiled program: a hundred programs for
    a small model on 8 devices. That only helps if the copies are on several hosts.
    """
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    if jax.process_count() == 1 and hasattr(handler, "_use_replica_parallel"):
        handler._use_replica_parallel = False


def empty_arrays(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array of a tree that has no elements, by path.

    Orbax refuses to save such arrays, and rollouts of texts without a prompt have one.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, str(leaf.dtype))
        for path, leaf in leaves
        if not leaf.size
    }


def without_empty(tree: Any) -> Any:
    """The tree with None for each array without elements."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def filled(leaf: Any) -> jax.Array:
    """The array itself; an array without elements if only its shape is given."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    part = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: part)


def is_news(record: logging.LogRecord) -> bool:
    """False for log records that say nothing new: tracebacks of Orbax's threads.

    `Checkpoints` reports those failures. Also False for Orbax's note that a save has no quality.
    """
    is_unmeasured = str(record.msg).startswith("Requested `tracked_metric`")
    return not ((record.exc_info or is_unmeasured) and "orbax" in record.pathname)
