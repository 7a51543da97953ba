"""Checkpoints of a run, by Orbax: written during training, whole or not at all.

A checkpoint's number is its count of optimizer updates. It has up to five items: `state`
(parameters, optimizer, counters), `facts` (a JSON object: the run's progress), `experience` (the
current rollout, if the run stopped between two updates on it), `ahead` (rollouts that were sampled
but not yet trained on) and `reference` (that of the KL term, if the run has refreshed it). A file
beside them has the SHA-256 of each file (`run/checksums.py`). It is written before Orbax gives the
checkpoint its name, so a checkpoint with a name is whole, and later damage is found before a
restore. Orbax itself restores flipped bits silently.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import path as ocp_path
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from grpo_jax.devices import sharding, transfer
from grpo_jax.hosts import processes
from grpo_jax.messages.console import say
from grpo_jax.run import disk, integrity, orbax_internals, saved
from grpo_jax.structs import Experience, Params, Rollouts, TrainState


class NotSaved(ValueError):  # noqa: N818
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the one of best quality.

    Each process writes and reads its own parts of the arrays, and all processes must make each
    call. A failed save, for example on a full disk, is reported, and its files are deleted. Earlier
    checkpoints are untouched.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int,
        due_every: int = 0,
        max_failed: int = 1,
        on_saved: Callable[[int], None] = lambda number: None,
    ):
        """`folder`: a local folder, or an address that Orbax knows, as gs://BUCKET/PATH.

        `due_every`: the newest two whose numbers are multiples of it are kept too. `max_failed`
        saves in a row may fail before `NotSaved` is raised. `on_saved(number)` is called on the
        first process once a checkpoint is written whole. Raises ValueError if the folder cannot be
        used, for example because it holds something else.
        """
        folder = epath.Path(folder)
        self._folder = folder if "://" in str(folder) else folder.absolute()
        integrity.refuse_pattern(self._folder)
        self._on_saved = on_saved
        self._keep, self._due_every = keep, due_every
        self._max_failed, self._num_failed = max_failed, 0
        self._saving: int | None = None  # the number of the checkpoint that is being written
        self._num_bytes = 0  # of its arrays
        self._fault = ""  # why the newest save failed; "" if it did not
        self._manager = self._open()
        try:
            integrity.refuse_strangers(self._folder)
        except ValueError:
            self._manager.close()
            raise

    def _open(self) -> ocp.CheckpointManager:
        quality = lambda metrics: metrics["quality"]  # noqa: E731
        kept = [
            LatestN(n=self._keep),
            BestN(get_metric_fn=quality, n=1, keep_checkpoints_without_metrics=False),
        ]
        if self._due_every:
            kept.append(EveryNSteps(interval_steps=self._due_every, max_to_keep=2))
        options = ocp.CheckpointManagerOptions(
            best_fn=quality,  # without it a reopened manager forgets earlier qualities
            preservation_policy=AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            temporary_path_class=orbax_internals.sealing(self._folder),
        )
        # By name: otherwise a manager that has saved no rollout itself finds none in a checkpoint.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "facts": ocp.JsonCheckpointHandler(),
        } | {name: ocp.StandardCheckpointHandler() for name in saved.OPTIONAL}
        logging.getLogger("absl").addFilter(orbax_internals.is_news)
        orbax_internals.ask_for_no_metrics()
        orbax_internals.write_arrays_whole()
        try:
            return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        except Exception as error:  # from storage, library or disk, without a common base class
            raise ValueError(
                f"The checkpoint folder {self._folder} cannot be used ({type(error).__name__}: "
                f"{error}). Check checkpoint.folder and the rights to it; gs:// needs pip install "
                "gcsfs, and the machine's access to the bucket."
            ) from error

    def save(
        self,
        state: TrainState,
        facts: dict[str, Any],
        *,
        experience: Experience | None = None,
        ahead: Rollouts | None = None,
        reference: Params | None = None,
        quality: float | None = None,
    ) -> None:
        """Starts to write a checkpoint; returns once the values are copied off the device.

        It first waits for the previous save. `quality`: held-out accuracy of exactly these
        parameters, or their held-out reward if no reward measures accuracy; None if not evaluated.
        """
        self.wait()
        number, self._fault = int(state.num_updates), ""
        numbers = self._manager.all_steps()
        if number in numbers:  # the same state, saved a moment ago
            if quality is None or len(numbers) == 1:
                return
            self._manager.delete(number)  # saved by a stop, before its evaluation
        rollouts = {"experience": experience, "ahead": ahead}
        rollouts = {name: arrays for name, arrays in rollouts.items() if arrays is not None}
        empty = {name: orbax_internals.empty_arrays(arrays) for name, arrays in rollouts.items()}
        facts = facts | ({"empty": empty} if any(empty.values()) else {})
        items = {"state": ocp.args.StandardSave(state), "facts": ocp.args.JsonSave(facts)}
        for name, arrays in rollouts.items():
            items[name] = ocp.args.StandardSave(orbax_internals.without_empty(arrays))
        if reference is not None:
            items["reference"] = ocp.args.StandardSave(reference)
        metrics = None if quality is None else {"quality": quality}
        self._saving = number
        self._num_bytes = sum(
            x.nbytes for x in jax.tree.leaves((state, experience, ahead, reference))
        )
        try:
            self._manager.save(number, args=ocp.args.Composite(**items), metrics=metrics)
        except Exception as error:  # as in `_open`
            self._fault = integrity.reason(error)

    def poll(self) -> None:
        """Reports a failed save and deletes its files; does not wait for a save in progress."""
        if self._saving is None:
            return
        busy = self._manager.is_saving_in_progress()
        if not processes.agree("busy" if busy else ""):
            self.wait()

    def wait(self) -> None:
        """Waits until the current save is on disk, or has failed and is reported.

        Raises `NotSaved` once `max_failed` saves in a row have failed.
        """
        if self._saving is None:
            return
        number, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `_open`
            self._fault = integrity.reason(error)
        self._fault = processes.agree(self._fault)
        if not self._fault:
            self._num_failed = 0
            if processes.is_first():
                self._on_saved(number)
            return
        self._num_failed += 1
        self._discard(number)
        self._fault = self._told(number)
        if self._num_failed >= self._max_failed:
            raise NotSaved(self._fault)
        say(
            f"warning: {self._fault} The run goes on and tries again at the next save; it ends "
            f"when checkpoint.max_failed = {self._max_failed} fail in a row."
        )

    def close(self) -> None:
        """Waits for the current save, then closes. Raises `NotSaved` if the last save failed."""
        try:
            self.wait()
        finally:
            self._let_go()
        if self._fault:
            raise NotSaved(self._fault)

    def _let_go(self) -> None:
        try:
            self._manager.close()
        except Exception as error:  # the same failure, seen by another writer
            self._fault = self._fault or integrity.reason(error)

    def _discard(self, number: int) -> None:
        """Deletes the files of a failed save, and reopens the manager without it."""
        self._let_go()
        if processes.is_first():  # Orbax would too, but after the message with the free space
            for partial in list(self._folder.iterdir()):
                if partial.name.startswith(f"{number}{ocp_path.atomicity.TMP_DIR_SUFFIX}"):
                    if not disk.delete(partial):
                        say(f"warning: {partial} could not be deleted. It is no checkpoint.")
        processes.barrier("the end of a failed save")
        self._manager = self._open()

    def _told(self, number: int) -> str:
        before, free = self._manager.latest_step(), disk.free(self._folder)
        return (
            f"checkpoint {number} could not be written to {self._folder}: {self._fault}. It has "
            f"{disk.size(self._num_bytes)} before compression{free and f', and {free} are free'}. "
            + ("There is no checkpoint yet." if before is None else f"The newest is {before}.")
        )

    def latest(self, *, begin_again: bool = False) -> int | None:
        """The number of the newest undamaged checkpoint; None if there is no checkpoint.

        All its files are read; each process reads a share. Newer, damaged checkpoints are reported
        and renamed, so that their names are no numbers. If all are damaged, ValueError is raised
        and nothing is renamed, unless the run may `begin_again`. A checkpoint that cannot be read
        raises ValueError too.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for number in sorted(self._manager.all_steps(), reverse=True):
            wrong = self._damage(number)
            if not wrong:
                break
            damaged[number] = wrong
        if damaged and len(damaged) == len(self._manager.all_steps()) and not begin_again:
            told = "; ".join(f"{number}: {wrong}" for number, wrong in list(damaged.items())[:3])
            raise ValueError(
                f"All checkpoints in {self._folder} are damaged ({told}). Nothing was changed. "
                "Bring one back, or begin at step 0 with --config.checkpoint.begin_again=True."
            )
        for number, wrong in damaged.items():
            self._set_aside(number, wrong)
        return self._manager.latest_step()

    def whole(self, number: int) -> bool:
        """Whether a checkpoint is undamaged.

        All its files are read; each process reads a share. A damaged one is reported and renamed,
        so that its name is no number.
        """
        wrong = self._damage(number)
        if wrong:
            self._set_aside(number, wrong)
        return not wrong

    def _damage(self, number: int) -> str:
        """The damage that any process finds in its share of a checkpoint; "" for none."""
        folder = self._manager.directory / str(number)
        return processes.agree(integrity.damage(folder, processes.number(), processes.count()))

    def _set_aside(self, number: int, wrong: str) -> None:
        folder = self._manager.directory
        aside, count = folder / f"damaged_{number}", 1
        while aside.exists():  # of another time
            count += 1
            aside = folder / f"damaged_{number}_{count}"
        processes.barrier(
            "the setting aside of a damaged checkpoint"
        )  # all have seen which name is free
        if processes.is_first():
            (folder / str(number)).rename(aside)
        processes.barrier("the reading of the checkpoint before")
        self._manager.reload()
        before = max((n for n in self._manager.all_steps() if n < number), default=None)
        lost = number - (before or 0)
        say(
            f"warning: checkpoint {number} in {folder} is damaged: {wrong}. It is not used; it "
            f"was renamed to {aside.name}, which may be deleted. "
            + ("There is none before it" if before is None else f"The one before is {before}")
            + f": {lost} update{'' if lost == 1 else 's'} must be computed again."
        )

    def numbers(self) -> list[int]:
        """The numbers of all whole checkpoints, the oldest first; waits for the current save."""
        self.wait()
        return sorted(self._manager.all_steps())

    def delete(self, number: int) -> None:
        """Deletes a checkpoint."""
        self._manager.delete(number)

    @property
    def folder(self) -> str:
        """The folder of the checkpoints."""
        return str(self._manager.directory)

    def facts(self, number: int) -> dict[str, Any]:
        """The run's progress at a checkpoint."""
        args = ocp.args.Composite(facts=ocp.args.JsonRestore())
        return self._manager.restore(number, args=args)["facts"]

    def restore(self, number: int, like: TrainState) -> TrainState:
        """The training state of a checkpoint, with the shapes and shardings of `like`.

        `like` may hold `jax.ShapeDtypeStruct`s. Raises ValueError, before any array is read, if the
        checkpoint is of another model or optimizer.
        """
        self.wait()
        saved.check_fits(self._manager, number, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(number, args=args)["state"]

    def experience(self, number: int, mesh: Mesh) -> Experience | None:
        """The rollout in training, its rows split over the mesh; None if there was none."""
        fields = self._rows(number, "experience", mesh)
        if fields is None:
            return None
        rollouts = Rollouts(**fields.pop("rollouts"))
        absent = {"old_logp_PGC": None, "ref_logp_PGC": None}
        return Experience(rollouts=rollouts, **(absent | fields))

    def ahead(self, number: int, mesh: Mesh) -> Rollouts | None:
        """Rollouts that were not yet trained on, on the host; None if there were none."""
        fields = self._rows(number, "ahead", mesh)
        return None if fields is None else transfer.to_host(Rollouts(**fields))

    def reference(self, number: int, like: Params) -> Params:
        """The refreshed reference of a checkpoint, with the shapes and shardings of `like`."""
        args = ocp.args.Composite(reference=ocp.args.StandardRestore(like))
        return self._manager.restore(number, args=args)["reference"]

    def _rows(self, number: int, name: str, mesh: Mesh) -> dict[str, Any] | None:
        items = dict(self._manager.item_metadata(number))
        if items.get(name) is None:
            return None

        def like(leaf: Any) -> jax.ShapeDtypeStruct:
            axes = ("rows",) + (None,) * (len(leaf.shape) - 1)
            placed = sharding.sharding_of(mesh, axes, leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

        restore = ocp.args.StandardRestore(jax.tree.map(like, items[name].tree))
        args = ocp.args.Composite(**{name: restore})
        fields = dict(self._manager.restore(number, args=args)[name])
        for path, (shape, dtype) in self.facts(number).get("empty", {}).get(name, {}).items():
            *parents, field = path.split("/")
            holder = functools.reduce(dict.__getitem__, parents, fields)
            holder[field] = like(jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)))
        return jax.tree.map(orbax_internals.filled, fields)
