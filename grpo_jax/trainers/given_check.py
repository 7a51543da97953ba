"""`--check` of the programs that train on given completions: reads and compiles, and ends.

It writes nothing and reads no weights, so it can check the workdir of a run in progress.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import record, reference, rules
from grpo_jax.devices import sharding
from grpo_jax.messages.console import say
from grpo_jax.models.policy import Policy
from grpo_jax.planning import fit
from grpo_jax.planning.given_programs import GivenStep
from grpo_jax.setup import inputs
from grpo_jax.trainers import check as check_lib
from grpo_jax.trainers import given, rollout
from grpo_jax.trainers.given import Data, Given
from grpo_jax.trainers.runs import Course

_GIB = 2**30


def check(row: Given, config: ConfigDict, folder: Path) -> None:
    """Reports what a run of the config in `folder` would do; ValueError if it could not start.

    Every process must call it.
    """
    say(f"The config, what is not the default:\n\n{reference.as_file(config)}\n")
    mesh = sharding.make_mesh(**config.mesh)
    policy = given.policy_of(row, config, folder, config.model.path)
    rules.check_heads(policy.model.num_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    data = row.read(config, policy, check_lib.date_of(config, folder), True)
    try:
        if check_lib.goes_on(folder):
            before = record.read(folder / "config.json").get("read", {})
            accepted = config.checkpoint.accept_changes
            sums = given.sums_of(config, policy, data)
            inputs.refuse_other(before, sums, f"--workdir {folder}", accepted)
        course = given.course_of(row, config, data)
        rows = _longest(row, config, data)
        for line in _told(row, config, policy, data, course):
            say(line)
        say("The programs of an update are compiled, which may take minutes.")
        learner = given.learner_of(row, config, policy, mesh, course)
        laid_out = rollout.cut(row.rollouts(rows, sharding.num_row_shards(mesh), config))
        step = GivenStep(
            config, policy.model, mesh, learner, laid_out, row.fields(config), row.phase
        )
        _tell_of_memory(row, max(program.peak for program in step.compile()))
    finally:
        data.close()
    say("Nothing speaks against this run.")


def _length(row: Given, config: ConfigDict, one: Any) -> int:
    laid_out = row.rollouts([one], 1, config)
    return int(laid_out.prompt_length_P.sum() + laid_out.length_PG.sum())


def _longest(row: Given, config: ConfigDict, data: Data) -> list[Any]:
    """As many of the longest rows as an update has; of a stream those of its first draw."""
    if not data.rows:
        return data.draw(0, {})[0]
    batch = config[row.section].batch
    lengths = [_length(row, config, one) for one in data.rows]
    order = np.argsort(lengths, kind="stable")[::-1]
    return [data.rows[i] for i in np.resize(order, batch)]


def _told(
    row: Given, config: ConfigDict, policy: Policy, data: Data, course: Course
) -> Sequence[str]:
    """A description of the run: its model, rows and steps."""
    model, number = policy.model, f"{data.number:,}" if data.number else "a stream of"
    return [
        f"Model: {model.family}, {model.num_params:,} parameters, {config.model.dtype}",
        f"Rows: {number} to train on, {len(data.held_out):,} held out",
        f"The run: {course.num_steps:,} updates of {course.prompts:,} rows"
        + (f", each row {course.num_steps * course.prompts / data.number:,.2f} times"
           if data.number else ""),
    ]  # fmt: skip


def _tell_of_memory(row: Given, peak: float) -> None:
    """Says how much memory an update needs; ValueError if programs may not use so much."""
    room = fit.limit_of_all()
    told = f"{peak / _GIB:,.2f} GiB of each device"
    if room is not None and math.isfinite(room):
        told += f", of {room / _GIB:,.2f}"
        if peak > room:
            raise ValueError(
                f"an update needs {told} that programs may use. Lower {row.section}.microbatch or "
                f"{row.section}.max_tokens, set model.remat = full, or split the model by "
                "mesh.fsdp."
            )
    say(f"Memory: {told} (at the longest rows)")
