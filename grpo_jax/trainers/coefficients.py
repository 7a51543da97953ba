"""The coefficients of the loss that change after each step, in the state of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from grpo_jax.devices import transfer
from grpo_jax.structs import Experience
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run


def in_force(run: Run, state: RunState) -> dict[str, float]:
    """The coefficients of the next updates, by their metrics' names; {} if all are constants."""
    kept = state.coefficients | {"step": state.step}
    return {c.metric: c.in_force(kept) for c in run.controllers}


def given_to(run: Run, experience: Experience, state: RunState) -> Experience:
    """The experience with the coefficients of its updates.

    They are arrays, so that a new value needs no new program.
    """
    arrays: dict[str, Any] = {}
    kept = state.coefficients | {"step": state.step}
    for controller in run.controllers:
        value = np.float32(controller.in_force(kept))
        alike_PG = np.full(experience.rollouts.length_PG.shape, value)
        arrays[f"{controller.coefficient}_PG"] = transfer.shard_rows(run.mesh, alike_PG)
    return experience.replace(**arrays) if arrays else experience


def follow(run: Run, kept: dict[str, float], metrics: dict[str, float]) -> None:
    """Updates `kept` after a step whose updates have these mean metrics."""
    for controller in run.controllers:
        kept.update(controller.after(kept, metrics))
