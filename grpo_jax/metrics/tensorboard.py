"""Scalars and texts for TensorBoard, in a log that survives a full disk."""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.run.append_log import Log


class _TensorBoard(NamedTuple):
    """The parts of tensorboardX that are used."""

    event_pb2: Any
    summary_pb2: Any
    summary: Any
    masked_crc32c: Callable[[bytes], int]


@functools.cache
def _tensorboard() -> _TensorBoard:
    """Imports tensorboardX without PyTorch, which takes seconds and serves only a type's name."""
    with _hidden("torch"):
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c
    return _TensorBoard(event_pb2, summary_pb2, summary, masked_crc32c)


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """While entered, a module that is not imported yet cannot be imported."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


class EventLog:
    """Scalars and texts for TensorBoard.

    tensorboardX's own writer is not used: its thread ends on a full disk, and then the run waits
    for it forever (2.6.5).
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None]):
        """Values of `first_step` or later in earlier files of the folder are no longer shown."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in order of name. Named only by second, a quick restart would
        # overwrite the one before.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._log = Log(folder / name, say)
        self._described: set[str] = set()
        pb = _tensorboard().event_pb2
        self._add(file_version="brain.Event:2")
        start = pb.SessionLog(status=pb.SessionLog.START)
        self._add(step=first_step, session_log=start)

    def scalar(self, name: str, value: float, step: int, description: str = "") -> None:
        """Writes a number; its card shows the description."""
        summary = _tensorboard().summary_pb2.Summary()  # its function would change the name
        added = summary.value.add(tag=name, simple_value=value)
        if name not in self._described:  # TensorBoard keeps the first description that it reads
            added.metadata.summary_description = description
            self._described.add(name)
        self._add(step=step, summary=summary)

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text in Markdown."""
        self._add(step=step, summary=_tensorboard().summary.text(name, text))

    def _add(self, **fields: Any) -> None:
        board = _tensorboard()
        data = board.event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        header = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", board.masked_crc32c(part)) for part in (header, data)]
        self._log.append(header + sums[0] + data + sums[1])

    def close(self) -> None:
        self._log.close()
