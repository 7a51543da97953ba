"""Reads the checkpoints of a run from outside the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from grpo_jax.messages.console import say
from grpo_jax.run import integrity
from grpo_jax.structs import Params

OPTIONAL = ("experience", "ahead", "reference")  # items that a checkpoint may lack


class NoneWhole(ValueError):  # noqa: N818
    """A folder holds no whole checkpoint."""


class Saved:
    """One checkpoint of a run, opened for reading. It renames nothing, so the run may go on.

    A context manager.
    """

    def __init__(self, folder: str | Path, number: int | None = None):
        """`number`: a checkpoint known to be undamaged; None: the newest undamaged one.

        Raises `NoneWhole` if there is none, ValueError if it cannot be read.
        """
        self.number = -1 if number is None else number  # its count of updates
        self._manager = _reader(folder)
        if number is not None:
            return
        for number in reversed(_numbers(self._manager)):
            wrong = integrity.damage(self._manager.directory / str(number))
            if not wrong:
                self.number = number
                return
            say(f"warning: checkpoint {number} in {folder} is damaged and passed over: {wrong}.")
        self._manager.close()
        raise NoneWhole(f"{folder} holds no whole checkpoint.")

    def facts(self) -> dict[str, Any]:
        """The run's progress at this checkpoint."""
        return _facts(self._manager, self.number)

    @property
    def head(self) -> str:
        """The head of its model, as in `ModelConfig`."""
        stored = self._manager.item_metadata(self.number)["state"].tree
        return "scalar" if "score" in stored["params"] else "vocabulary"

    def params(self, like: Params) -> Params:
        """The parameters alone, shaped and sharded as `like`.

        Raises ValueError if they are of another model.
        """
        check_fits(self._manager, self.number, {"params": like})
        return self._part({"params": like})["params"]

    def trained(self, like: Params) -> Params:
        """The parameters in full precision: the float32 master weights if there are any.

        They have their stored dtypes, and the shardings of `like`. Raises as `params`.
        """
        stored = self._manager.item_metadata(self.number)["state"].tree
        check_fits(self._manager, self.number, {"params": like})
        state = stored["opt_state"]
        is_copied = isinstance(state, dict) and "params" in state  # by `optim.with_master_weights`
        like = jax.tree.map(
            lambda x, there: jax.ShapeDtypeStruct(x.shape, there.dtype, sharding=x.sharding),
            like,
            state["params"] if is_copied else stored["params"],
        )
        if is_copied:
            return self._part({"opt_state": {"params": like}})["opt_state"]["params"]
        return self._part({"params": like})["params"]

    def _part(self, like: dict[str, Any]) -> dict[str, Any]:
        """The arrays of the state that `like` names."""
        restore = ocp.args.PyTreeRestore(
            item=like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=True,
        )
        args = ocp.args.Composite(state=restore)
        return self._manager.restore(self.number, args=args)["state"]

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()


def find(folder: str | Path, which: str) -> int:
    """The number of the checkpoint after a step of the run, or of the "best" evaluated one.

    Raises ValueError if there is none, or if it is damaged.
    """
    manager = _reader(folder)
    try:
        states = {n: _facts(manager, n).get("state", {}) for n in _numbers(manager)}
        steps = {s["step"]: n for n, s in states.items() if s and not s.get("update")}
        there = f"It has those after steps {', '.join(map(str, steps)) or '(none)'}."
        if which == "best":
            qualities = {n: (manager.metrics(n) or {}).get("quality") for n in steps.values()}
            known = [n for n, quality in qualities.items() if quality is not None]
            if not known:
                raise ValueError(f"{folder}: none of its checkpoints was evaluated. {there}")
            number = max(known, key=lambda n: (qualities[n], n))
        elif which.isdecimal() and int(which) in steps:
            number = steps[int(which)]
        else:
            raise ValueError(f"{folder} has no checkpoint after step {which}. {there}")
        wrong = integrity.damage(manager.directory / str(number))
    finally:
        manager.close()
    if wrong:
        raise ValueError(f"Checkpoint {number} in {folder} is damaged: {wrong}. {there}")
    return number


def _reader(folder: str | Path) -> ocp.CheckpointManager:
    path = epath.Path(folder)
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in ("state", *OPTIONAL)}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in ("facts", "metrics")}
    return ocp.CheckpointManager(
        path if "://" in str(path) else path.absolute(), item_handlers=handlers
    )


def _numbers(manager: ocp.CheckpointManager) -> list[int]:
    """The checkpoints' numbers, the oldest first, without other folders named by a number."""
    strangers = {int(name) for name in integrity.strangers(manager.directory)}
    return sorted({*manager.all_steps()} - strangers)


def _facts(manager: ocp.CheckpointManager, number: int) -> dict[str, Any]:
    args = ocp.args.Composite(facts=ocp.args.JsonRestore())
    return manager.restore(number, args=args)["facts"]


def newest_params(folder: str | Path, like: Params) -> Params:
    """The parameters of a run's newest undamaged checkpoint, shaped and sharded as `like`.

    Raises ValueError if there is none, or if it is of another model.
    """
    with Saved(folder) as newest:
        return newest.params(like)


def check_fits(manager: ocp.CheckpointManager, number: int, like: Any) -> None:
    """Raises ValueError unless the checkpoint's state holds the arrays of `like`, in their shapes.

    It compares only the top-level parts that `like` has. Orbax's own error comes in the middle of
    reading and leaves failed tasks behind.
    """
    stored, needed = _shapes(manager.item_metadata(number)["state"].tree), _shapes(like)
    parts = {name.split("/")[0] for name in needed}
    wrong = [f"{name} is missing" for name in needed.keys() - stored.keys()]
    wrong += [
        f"{name} has no place"
        for name in stored.keys() - needed.keys()
        if name.split("/")[0] in parts
    ]
    wrong += [
        f"{name} is {list(stored[name])}, needed {list(needed[name])}"
        for name in stored.keys() & needed.keys()
        if stored[name] != needed[name]
    ]
    if wrong:
        wrong.sort(key=lambda text: (not text.startswith("params/"), text))
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"Checkpoint {number} in {manager.directory} does not fit this model and optimizer: "
            f"{'; '.join(wrong[:3])}{more}."
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a tree, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
