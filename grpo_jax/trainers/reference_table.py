"""What the reference makes of the data of preferences: computed once, kept in the run's folder.

The reference is the policy as it begins; of adapters it is the model without them. It is read, it
scores every completion, and it is dropped before the policy is read. A continued run takes the
numbers from the file, so that it computes with the same ones, unless data or model are others by
their checksums.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.devices import transfer
from grpo_jax.hosts import processes
from grpo_jax.learner import experience
from grpo_jax.learner.experience import Prepare
from grpo_jax.messages.console import say
from grpo_jax.run.whole_files import write_whole
from grpo_jax.structs import Params, Rollouts

NAME = "reference.npz"  # in the run's folder
_TELL_EVERY_S = 10.0

Table = dict[str, np.ndarray]  # by part of the data: sums of log-probabilities, float32


def key_of(**facts: Any) -> str:
    """A checksum of all that the numbers depend on, as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def rows_sum(rows: Sequence[Sequence[Sequence[int]]]) -> str:
    """A checksum of rows of token sequences."""
    whole = hashlib.sha256()
    for row in rows:
        for ids in row:
            whole.update(len(ids).to_bytes(8, "little"))
            whole.update(np.asarray(ids, np.int32).tobytes())
    return whole.hexdigest()


def kept(
    folder: Path, key: str, shapes: dict[str, tuple[int, ...]], compute: Callable[[], Table]
) -> Table:
    """The table of these shapes from the folder, or computed and kept there.

    All processes call it, and all get the same numbers, which the first one keeps.
    """
    file = folder / NAME
    found = _read(file, key, shapes) if processes.is_first() else None
    if not processes.agree("kept" if found is not None else ""):
        table = compute()
        if processes.is_first():
            data = io.BytesIO()
            np.savez(data, key=np.array(key), **table)
            write_whole(file, data.getvalue())
        processes.barrier("the reference's log-probabilities")
        return table
    mine = found or {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return transfer.from_first(mine)


def _read(file: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> Table | None:
    """The file's table; None if there is none, or it is of something else."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            table = {name: stored[name] for name in shapes}
            is_same = str(stored["key"]) == key
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"warning: {file} cannot be read ({type(error).__name__}: {error}); it is made anew.")
        return None
    if not is_same or any(table[name].shape != shape for name, shape in shapes.items()):
        say(f"{file} is of other data or another model; it is made anew.")
        return None
    return table


def scored(
    prepare: Prepare,
    params: Params,
    batches: Iterator[tuple[int, Rollouts]],
    number: int,
    place: Callable[[Rollouts], Rollouts],
) -> np.ndarray:
    """Log-probabilities of completions, summed over their tokens, float32 [number of rows, G].

    `batches` gives the rows of each batch, which may be fewer than those of its rollouts, and the
    rollouts; `place` brings these to the devices.
    """
    sums = jax.jit(experience.completion_sums)
    found, told, done = [], time.monotonic(), 0
    for rows, rollouts in batches:
        given = prepare.log_probs(params, None, place(rollouts))
        sum_PG = given.in_order(sums(given.rollouts, given.old_logp_PGC))
        found.append(sum_PG[:rows])
        done += rows
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            say(f"The reference has read {done:,} of {number:,} rows.")
    return np.concatenate(found)
