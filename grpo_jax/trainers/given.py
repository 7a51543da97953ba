"""Runs on completions that the data give: one builder for supervised training and its relatives.

They differ in a row of a table, `Given`: how data become the `Rollouts` of a step, the loss,
whether a reference is needed, and what is measured on held-out data. The loop is that of `grpo.py`;
only `gather` differs, since nothing is sampled. What a step learns from follows from the config and
the number of its draw. So a run that was stopped anywhere continues as if it had not been stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.algorithm.components import LossComponent
from grpo_jax.config import derived, guard_rules, rules
from grpo_jax.config.dotted import flatten
from grpo_jax.data import problems as problems_lib
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.data import subset
from grpo_jax.devices import sharding, transfer
from grpo_jax.devices.phases import phase
from grpo_jax.environments.questions import Questions
from grpo_jax.learner.experience import Prepare
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.scalars import make_values
from grpo_jax.messages.console import say
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.registry import Reward
from grpo_jax.run import claim, workdir
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.run.stop import PATIENCE_S, Stopped, StopSignal
from grpo_jax.setup import examples, inputs, lora, model, reward_models
from grpo_jax.setup.engine import make_engine, make_evaluator
from grpo_jax.setup.learner import Learner, make_supervised_learner
from grpo_jax.setup.rewards import start_rewards
from grpo_jax.setup.run_folder import open_for
from grpo_jax.structs import Experience, Params, Rollouts
from grpo_jax.trainers import exporting, grpo, model_card, restarts, rollout, tracking
from grpo_jax.trainers.listeners import Callback
from grpo_jax.trainers.monitor import Monitor
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Course, Run

Place = dict[str, Any]
"""Where a stream of data is read on from, as JSON; {} for data that are all in memory."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run on given completions learns from, and is measured on.

    `draw(number, place)` returns the rows of a draw, and the place after them. The rows follow from
    the number and the seed; the place only says from where they are found without reading all that
    comes before.
    """

    draw: Callable[[int, Place], tuple[list[Any], Place]]
    number: int  # rows of an epoch; 0: not known, as of a stream
    sums: dict[str, Any]  # checksums, as of `inputs.of_problems`
    held_out: Sequence[Any] = ()  # rows of the same kind
    problems: Questions | None = None  # held-out problems that the rewards score; None: none
    rewards: Sequence[Reward] = ()  # if there are such problems
    close: Callable[[], None] = lambda: None  # ends what reads a stream
    rows: Sequence[Any] = ()  # all rows of an epoch, if they are in memory


@dataclasses.dataclass(frozen=True)
class Given:
    """A way to train on given completions.

    `section` of the config has the options of `given_options.schedule_options`. A row of data may
    be anything that `rollouts` understands.
    """

    name: str  # of the program, in the progress line and in the model card
    section: str  # of the config
    step: str  # name of a step in messages
    loss: str  # the metric of the loss component
    phase: str  # of updates, one of `phases.PHASES`
    # Reads and checks the data: (config, policy, date of templates, whether it is evaluated).
    read: Callable[[ConfigDict, Policy, datetime, bool], Data]
    # Lays out the rows of a step for `shards` data shards: (rows, shards, config).
    rollouts: Callable[[list[Any], int, ConfigDict], Rollouts]
    component: Callable[[ConfigDict], LossComponent]
    # A row without meaning, for plans: (prompt, completions), as token ids.
    row_of: Callable[[Sequence[int], Sequence[Sequence[int]]], Any]
    # A few rows as samples: (rows, run).
    samples: Callable[[list[Any], Run], list[dict[str, Any]]]
    # The values that stay fixed in the update: (run, state, rows, completions on the device).
    experience: Callable[[Run, RunState, list[Any], Rollouts], Experience]
    # Metrics of held-out rows: (run, state, rows, what to call after each batch).
    measure: Callable[[Run, RunState, Sequence[Any], Callable[[], None]], dict[str, float]]
    # Dtypes of the fields [P, G] of the experience beside the usual ones, for plans.
    fields: Callable[[ConfigDict], dict[str, str]] = lambda config: {}
    held_out_loss: str = ""  # one of these metrics, which says which checkpoint is the best
    group: int = 1  # completions of a row
    reads_reference: Callable[[ConfigDict], bool] = lambda config: False
    # What is computed once, from data and reference, before the policy is read: (run, data, what
    # reads the reference) -> data.
    begin: Callable[[Run, Data, Callable[[], Params]], Data] = lambda run, data, reference: data
    head: str = "vocabulary"  # or "scalar": a bias-free [D, 1] kernel
    # Makes the new model of model.path = ""; None: a model must be given.
    new_policy: Callable[[ConfigDict], Policy] | None = None
    # Writes the trained model as a folder: (run, state, folder).
    export: Callable[[Run, RunState, Path], None] = lambda run, state, folder: exporting.export(
        run.policy, folder, state.train, run.config.checkpoint.export_dtype, run.frozen
    )


def run(
    row: Given,
    config: ConfigDict,
    folder: Path,
    stop: StopSignal | None = None,
    *,
    is_start: bool = False,
    callbacks: tuple[Callback, ...] = (),
    model_path: str = "",
) -> Path:
    """Trains, or continues the training in `folder`; returns the exported Hugging Face folder.

    `stop`: the caller's stop signal; None: the training installs its own. `is_start`: a later run
    evaluates the model. `callbacks` are called after each step. `model_path`: a model that was made
    for it, in the place of the config's. Raises ValueError for a user's mistake, `guards.Diverged`
    if a guard ends the training, and `stop.Stopped` after a requested stop has saved.
    """
    path = model_path or config.model.path
    if config.lora.rank and not path and not is_start:
        raise ValueError(
            f"lora.rank = {config.lora.rank} trains adapters beside a model's weights, and "
            'model.path = "" makes a new model, whose weights say nothing yet. Set model.path, or '
            "lora.rank = 0."
        )
    began = time.monotonic()
    with claim.held(), stop or StopSignal(config.checkpoint.save_before_s) as stop:
        with phase("start"), stop.nothing_to_lose():
            open_for(config, folder)
            made, data = build(row, config, folder, path, evaluates=not is_start)
            if made is None:
                data.close()
                return folder / "export"
            made = dataclasses.replace(made, callbacks=callbacks)
        train = functools.partial(grpo.train, gather=functools.partial(_gather, row, data))
        try:
            return restarts.carry_out(made, stop, began, train, functools.partial(_finish, row))
        finally:
            data.close()
            if made.rewards is not None:
                made.rewards.close()


def _gather(row: Given, data: Data, run: Run, state: RunState, monitor: Monitor) -> None:
    """Sets the state's experience to the rows of its step."""
    rows, place = data.draw(state.draw_of(state.step), state.place)
    monitor.given(state, lambda: row.samples(rows, run))
    given = rollout.device_rows(run, row.rollouts(rows, num_shards(run), run.config))
    state.experience = row.experience(run, state, rows, given)
    state.place = place


def num_shards(run: Run) -> int:
    """Devices that share the rows of a step; the prompts of its rollouts split over them."""
    return sharding.num_row_shards(run.mesh)


def experience(
    run: Run,
    state: RunState,
    given: Rollouts,
    signal_PG: np.ndarray | None = None,
) -> Experience:
    """The experience of completions on the device, with a reference if the run has one.

    `signal_PG`: a number of each completion, float32, which becomes its advantage as it is; None:
    the loss reads none.
    """
    if signal_PG is None:
        signal_PG = np.zeros(given.length_PG.shape, np.float32)
    signal = transfer.shard_rows(run.mesh, signal_PG)
    reference = transfer.to_device_memory(state.reference)  # copies one in host memory
    log_probs = run.prepare.log_probs(run.weights(state.train), reference, given)
    return run.prepare(log_probs, signal)


def log_probs(
    run: Run, state: RunState, given: Rollouts, weights: Params | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Log-probabilities of completions, float32 [P, G, C] on the host, and under the reference.

    `given`: as `Given.rollouts` returns them. `weights`: None for those of the state.
    """
    weights = run.weights(state.train) if weights is None else weights
    reference = transfer.to_device_memory(state.reference)
    rows = rollout.device_rows(run, given)
    found = run.measuring.log_probs(weights, reference, rows)
    ref_PGC = None if found.ref_logp_PGC is None else found.in_order(found.ref_logp_PGC)
    return found.in_order(found.old_logp_PGC), ref_PGC


def _finish(row: Given, run: Run, state: RunState, stop: StopSignal, wall_s: float) -> Path:
    """Exports the model."""
    run.checkpoints.close()
    export = run.folder / "export"
    with stop.nothing_to_lose(PATIENCE_S):
        claim.check()
        row.export(run, state, export)
        workdir.note_export(export, step=state.step, updates=int(state.train.num_updates))
        given = flatten(run.config)
        model_card.write(export, run.policy, given, step=state.step, method=row.name)
        if stop.asked():  # a later run is asked to stop, too
            raise Stopped(
                f"Stopped by {stop.name} at {run.course.step} {state.step}; all is saved in "
                f"{run.folder}. The same command continues the run."
            )
    return export


# --- Data -----------------------------------------------------------------------------------------


def rows(config: ConfigDict, policy: Policy, section: str, kind: str, now: datetime) -> Data:
    """The training rows of the config's dataset, as a `kind` of `examples.KINDS`.

    In memory, or with data.streaming read while they are needed. ValueError for rows that do not
    fit, by file, row and column; of a stream for those among the first.
    """
    source = problems_lib.train_source(config.data)
    if config.data.streaming:
        stream, renderer = examples.stream(config, policy, section, kind, source, now)

        def close() -> None:
            stream.close()
            renderer.close()

        return Data(stream.draw, 0, inputs.of_stream(stream.parts), close=close)
    found = examples.load(config, policy, section, kind, source, "rows to train on", now)
    found = subset.take(found, config.data.subset)
    batch = config[section].batch

    def draw(number: int, place: Place) -> tuple[list[Any], Place]:
        index = prompts_lib.prompt_indices(config.seed, number, len(found), batch)
        return [found[i] for i in index], place

    return Data(draw, len(found), inputs.of_examples(found), rows=found)


def held_out(
    config: ConfigDict, policy: Policy, section: str, kind: str, now: datetime
) -> list[Any]:
    """The held-out rows of the same kind; [] if there are none, or none with completions."""
    source = problems_lib.held_out_source(config.data)
    most = config.evaluation.num_problems
    if source is None or not most:
        return []
    if not examples.are_given(config, kind, source):
        say(f"{source}: its rows have no completions, so the loss is not measured on them.")
        return []
    return examples.load(config, policy, section, kind, source, "held-out rows", now, most)


# --- What the run is made of ----------------------------------------------------------------------


def build(
    row: Given, config: ConfigDict, folder: Path, path: str, *, evaluates: bool
) -> tuple[Run | None, Data]:
    """The run and its data, read and checked; no run if the folder already has its export.

    The folder is open. `path`: the model's, "" for a new one. `evaluates`: whether the run measures
    held-out data, and its metrics go to the config's trackers.
    """
    mesh = sharding.make_mesh(**config.mesh)
    now = inputs.date(config.data.date, folder)
    policy = policy_of(row, config, folder, path)
    rules.check_heads(policy.model.num_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    if evaluates:
        tracking.check(config)
    is_done = (folder / "export" / "config.json").exists()
    data = row.read(config, policy, now, evaluates and not is_done)
    sums = sums_of(config, policy, data)
    inputs.hold(folder, sums, config.checkpoint.accept_changes)
    if is_done:
        return None, data
    policy = policy_lib.keep(policy, folder / "source")
    lora.keep(config, folder)
    course = dataclasses.replace(course_of(row, config, data), is_tracked=evaluates)
    learner = learner_of(row, config, policy, mesh, course)
    made = _run(row, config, folder, policy, mesh, data, course, learner, sums)
    data = row.begin(made, data, _reference(made))
    models = reward_models.load_all(config, data.rewards, mesh, now) if data.problems else None
    sizes = made.sizes | (models.sizes if models else {})
    rewards = None  # last: no more checks follow
    if data.problems:
        rewards = start_rewards(config, list(data.rewards), models=models, folder=folder)

    def measure(run: Run, state: RunState, alive: Callable[[], None]) -> dict[str, float]:
        return row.measure(run, state, data.held_out, alive)

    measures = {"measure": measure} if data.held_out else {}
    return dataclasses.replace(made, rewards=rewards, sizes=sizes, **measures), data


def sums_of(config: ConfigDict, policy: Policy, data: Data) -> inputs.Sums:
    """Checksums of what a run reads."""
    found = {"training problems": data.sums, "model": inputs.of_model(policy)}
    return found | inputs.of_adapter(config.lora.path)


def learner_of(
    row: Given, config: ConfigDict, policy: Policy, mesh: Mesh, course: Course
) -> Learner:
    """The learner of a row; nothing is compiled yet."""
    return make_supervised_learner(
        config,
        policy.model,
        mesh,
        course.num_steps,
        component=row.component(config),
        section=row.section,
        group=row.group,
    )


def policy_of(row: Given, config: ConfigDict, folder: Path, path: str) -> Policy:
    """The policy at a path, or a new one."""
    if not path:
        if row.new_policy is None:
            raise ValueError(
                f'model.path = "" names no model, and {row.name} begins with one. Set model.path '
                "to a Hugging Face folder or hub id."
            )
        return row.new_policy(config)
    policy = policy_lib.read(path, kept=folder / "source", head=row.head)
    policy = policy.within(derived.longest_row(config, row.section))
    return lora.adapted_policy(policy, config, folder / lora.KEPT)


def _run(
    row: Given,
    config: ConfigDict,
    folder: Path,
    policy: Policy,
    mesh: Mesh,
    data: Data,
    course: Course,
    learner: Learner,
    sums: inputs.Sums,
) -> Run:
    frozen = lora.frozen_params(policy, mesh, config.model.dtype)
    engine = make_engine(config, policy.model, policy.stop_ids, mesh) if data.problems else None
    measuring, measured = _measuring(learner)
    made = Run(
        config=config,
        course=course,
        folder=folder,
        mesh=mesh,
        policy=policy,
        train=Questions([], [], []),
        held_out=data.problems,
        engine=None,
        evaluator=None if engine is None else make_evaluator(config, engine),
        optimizer=learner.optimizer,
        learning_rate=learner.learning_rate,
        prepare=learner.prepare,
        update=learner.update,
        sizes=learner.sizes | ({"evaluation": measured} if data.held_out else {}),
        frozen=frozen,
        checkpoints=Checkpoints(
            config.checkpoint.folder or folder / "checkpoints",
            keep=config.checkpoint.keep,
            max_failed=config.checkpoint.max_failed,
            on_saved=functools.partial(workdir.note_saved, folder),
            due_every=guard_rules.may_roll_back(config) * course.save_every,
        ),
        read=sums,
        measuring=measuring if data.held_out else None,
        rewards=None,
    )
    if not row.reads_reference(config):
        return made
    return dataclasses.replace(made, first_reference=_reference(made))


def _measuring(learner: Learner) -> tuple[Prepare, CompiledSizes]:
    """What scores held-out completions, and its row sizes: log-probabilities, or values."""
    if learner.scorer.model.head == "scalar":
        values = make_values(learner.scorer)
        return dataclasses.replace(learner.prepare, values=values), values.sizes
    measuring = dataclasses.replace(learner.prepare, with_old=True, sizes=CompiledSizes())
    return measuring, measuring.sizes


def _reference(run: Run) -> Callable[[], Params]:
    """What reads the policy as it begins; for adapters the model without them."""
    where = run.policy, run.mesh, run.frozen, run.folder / lora.KEPT
    return functools.partial(model.first_reference, run.config, *where)


def course_of(row: Given, config: ConfigDict, data: Data) -> Course:
    """The schedule of the training."""
    schedule = config[row.section]
    if schedule.num_epochs and not data.number:
        raise ValueError(
            f"{row.section}.num_epochs = {schedule.num_epochs:g}, but how many rows a stream has "
            f"is not known before its end. Set {row.section}.num_steps, and "
            f"{row.section}.num_epochs = 0; or data.streaming = False."
        )
    num_steps = derived.num_supervised_steps(config, data.number, row.section)
    if schedule.num_epochs:
        say(f"{schedule.num_epochs:g} epochs are {num_steps} updates of {schedule.batch}.")
    return Course(
        num_steps=num_steps,
        prompts=schedule.batch,
        evaluate_every=schedule.evaluate_every_steps,
        save_every=schedule.checkpoint_every_steps,
        # Only those of the first step: given completions do not change.
        samples_every=num_steps if config.logging.samples_every_steps else 0,
        step=row.step,
        bar=row.name,
        shown_every=100,
        update_phase=row.phase,
        loss=row.loss,
        held_out_loss=row.held_out_loss,
        learning_rate=f"{row.section}.learning_rate",
    )
