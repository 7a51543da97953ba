"""What of Orbax's own insides the checkpoints change."""

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
    """What Orbax makes the folder of a checkpoint with; before giving it its name, it sums it up.

    That happens in the thread that writes, on the first process, when all have written.
    """

    class Sealing(ocp_path.atomicity_defaults.get_default_temporary_path_class(folder)):
        async def finalize(self) -> None:
            # The items of a checkpoint, which come here too and before it, have no such store. It
            # writes the time of the end, Orbax's last change of a file: done before the sums.
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
    """Orbax logs how fast TensorStore wrote, from a list of metrics that is never freed.

    TensorStore 0.1.86 keeps what it hands to Python: 16 kB and more a save, without end.
    """
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src.serialization import tensorstore_utils

        if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
            tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0  # none: not logged


def write_arrays_whole() -> None:
    """In a single process an array's copies on several devices are not written piece by piece.

    By default each copy writes a part of it, which is cut off by a program of its own: a hundred
    were compiled for a small model on 8 devices. That helps where the copies are of several hosts.
    """
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    if jax.process_count() == 1 and hasattr(handler, "_use_replica_parallel"):
        handler._use_replica_parallel = False


def empty_arrays(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array of a tree that has no element, by its path.

    Orbax refuses to save such arrays: rollouts of texts without a prompt have one.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, str(leaf.dtype))
        for path, leaf in leaves
        if not leaf.size
    }


def without_empty(tree: Any) -> Any:
    """A tree of arrays with None in the place of each that `empty_arrays` names."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def filled(leaf: Any) -> jax.Array:
    """An array that was read as it is; one without elements in the place of its shape."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    part = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: part)


def is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks of Orbax's threads: what failed there is told by `Checkpoints`.

    And for a save without a quality, which not every save has.
    """
    is_unmeasured = str(record.msg).startswith("Requested `tracked_metric`")
    return not ((record.exc_info or is_unmeasured) and "orbax" in record.pathname)
