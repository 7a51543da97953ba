"""The state of a run: everything that a checkpoint keeps. Saving, loading, and rolling back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import record
from grpo_jax.data.pass_rates import PassRates
from grpo_jax.devices import transfer
from grpo_jax.devices.phases import phase
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.learner import train_state
from grpo_jax.messages.console import say
from grpo_jax.models import policy
from grpo_jax.run import workdir
from grpo_jax.setup import inputs, lora
from grpo_jax.structs import Experience, Params, Rollouts, TrainState
from grpo_jax.trainers.guards import History
from grpo_jax.trainers.runs import Run


@dataclasses.dataclass
class RunState:
    """Everything that a checkpoint keeps of a run: arrays, and numbers as JSON.

    Metrics of step n, counted from 1, describe its rollout and the policy after its updates; step 0
    is the model as it was given.
    """

    train: TrainState | None = None  # None: not read yet
    experience: Experience | None = None  # data of the updates of `step`; None: none yet
    next_rollout: Rollout | None = None  # sampled, and not yet in `experience`
    reference: Params | None = None  # of the KL term; None: not read yet, or there is none
    refreshed: int = 0  # times that the reference was refreshed; only then it is saved
    # What the controllers of coefficients keep between steps; changed in place, as `history`.
    coefficients: dict[str, float] = dataclasses.field(default_factory=dict)
    step: int = 0  # rollouts finished
    update: int = 0  # updates done on the rollout of `step`
    prompts: int = 0  # consumed
    tokens: int = 0  # generated
    wall_s: float = 0.0
    next_rollout_s: float = 0.0  # time to sample the completions that are saved ahead
    next_problems: list[int] = dataclasses.field(default_factory=list)  # numbers of theirs
    # Beside them: the fields of their `GivenUp`; []: there is none.
    next_given_up: list[list] = dataclasses.field(default_factory=list)
    checkpoint: int = -1  # number of the checkpoint that was loaded; -1: none
    last_due: int = -1  # number of the newest one due by checkpoint.every_steps
    # Where a streamed dataset is read on from, for the next step without an experience.
    place: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Draws beyond one a step: undone ones, and further ones of a step. They are not reused.
    passed_over: int = 0
    rolled_back_to: int = -1  # number of the last roll-back's checkpoint
    history: History = dataclasses.field(default_factory=History)
    pass_rates: PassRates | None = None  # None: nothing was measured
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of packed rows, by program
    accuracy_before: float | None = None
    accuracy: float | None = None  # newest
    held_out_reward_before: float | None = None
    held_out_reward: float | None = None  # newest
    first_evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    rollout_metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of `step`
    update_metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)  # the same
    # If the run was stopped before the evaluation after `step`: that step's metrics so far.
    unevaluated: dict[str, float] = dataclasses.field(default_factory=dict)

    def draw_of(self, step: int) -> int:
        """The number of the draw that determines a step's prompts and random key.

        Of several draws, the first.
        """
        return step + self.passed_over

    def count_draws(self, rollout: Rollout) -> None:
        """Counts the draws of the rollout that the next updates learn from."""
        self.passed_over += rollout.draws.number - 1 if rollout.draws else 0

    @property
    def sampled(self) -> int:
        """Number of steps sampled and rewarded: finished ones, and one during its updates."""
        return self.step + (self.experience is not None)

    def finish_step(self) -> None:
        """Ends the step after all of its updates: drops the rollout's data."""
        self.step, self.update, self.experience = self.step + 1, 0, None
        self.rollout_metrics, self.update_metrics = {}, []

    def as_json(self) -> dict[str, Any]:
        """Everything but the arrays."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in fields.items() if n not in _ARRAYS} | {
            "history": dataclasses.asdict(self.history),
            "pass_rates": None if self.pass_rates is None else self.pass_rates.as_json(),
        }


_ARRAYS = ("train", "experience", "next_rollout", "reference")


def newest(run: Run) -> RunState:
    """The state at the newest checkpoint, or at the start if there is none.

    Raises ValueError if the checkpoint is of another config, or if the run's checkpoints are gone.
    """
    again, folder = run.config.checkpoint.begin_again, run.checkpoints.folder
    number = run.checkpoints.latest(begin_again=again)
    if number is None:
        workdir.begin(run.folder, folder, again=again)
        return RunState()
    state, binding = _read(run, number)
    accepted = record.accepted(run.folder)
    record.refuse(  # it may be another workdir's checkpoint
        record.not_accepted(binding, run.config, accepted),
        f"checkpoint.folder = {folder!r}",
        "Give the run a folder of its own",
    )
    before = run.checkpoints.facts(number).get("read")
    if before:
        accepted = (*run.config.checkpoint.accept_changes, *accepted)
        inputs.refuse_other(before, run.read, f"{folder}", accepted)
    middle = f", between updates {state.update} and {state.update + 1}" if state.update else ""
    say(f"Continuing {run.folder} after step {state.step}{middle}.")
    return state


def roll_back(run: Run, state: RunState, undone: int) -> RunState:
    """The state to continue from after undoing the steps up to `undone`: an older checkpoint.

    It is the newest checkpoint that was due when written. A checkpoint that a stop wrote does not
    count, since a run without stops would not have it. If the last roll-back went to that
    checkpoint, it is the due one before it, if kept. If all due checkpoints are gone, it is the
    newest of any kind. If none was due so far, the run begins again. Only newer checkpoints are
    deleted. The draws of the undone steps are skipped, so that the same data does not come again
    (as in Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, after loss spikes).
    """
    back = _to_go_back_to(run, state)
    if back is None:
        workdir.note_saved(run.folder, None)
        back = RunState(first_evaluation=state.first_evaluation)
        back.accuracy_before = back.accuracy = state.accuracy_before
        back.held_out_reward_before = back.held_out_reward = state.held_out_reward_before
    for number in run.checkpoints.numbers():
        if number > back.checkpoint:
            run.checkpoints.delete(number)
    following = back.step + bool(back.update)  # the next step to draw, from 0
    back.passed_over = state.draw_of(undone) - following
    back.rolled_back_to, back.tokens = back.checkpoint, state.tokens
    back.history.roll_backs = state.history.roll_backs + 1
    back.reference = None if state.refreshed else state.reference
    say(f"Going on after step {back.step}: steps {back.step + 1} to {undone} are undone.")
    return back


def _to_go_back_to(run: Run, state: RunState) -> RunState | None:
    """The state of the undamaged checkpoint that `roll_back` chooses; None: the start."""
    newest = again = None
    for number in reversed(run.checkpoints.numbers()):
        if not run.checkpoints.whole(number):
            continue
        found, _ = _read(run, number)
        newest = newest or found
        if found.last_due == number:
            if number != state.rolled_back_to:
                return found
            again = found
    return again or (newest if state.last_due >= 0 else None)


def load(run: Run, state: RunState) -> Rollouts | None:
    """Reads the arrays of a state; returns the completions already sampled for its next step.

    None if there are none, and after a roll-back. A roll-back also drops an experience without
    updates. A reference that was never refreshed is read where the model is, unless the state has
    it already. Raises ValueError if the parameters or the optimizer's state are not finite.
    """
    for name, sizes in run.sizes.items():
        sizes.restore(state.sizes.get(name))
    model, mesh, optimizer = run.policy.model, run.mesh, run.optimizer
    dtype, number = jnp.dtype(run.config.model.param_dtype), state.checkpoint
    if state.refreshed:
        saved = run.checkpoints.reference(number, _reference_like(run))
        state.reference = _kept_reference(run, saved)
    elif state.reference is None:
        state.reference = run.first_reference()
    if number < 0:
        params = lora.first_params(run.config, run.policy, mesh, run.folder / lora.KEPT)
        train = train_state.start(params, model, mesh, optimizer)
        state.train = _offloaded(run, train if run.critic is None else run.critic.first(train))
        return None
    like = train_state.state_like(model, mesh, optimizer, dtype)
    like = like if run.critic is None else run.critic.like(like)
    train = run.checkpoints.restore(number, like)
    policy.refuse_nonfinite(
        train,
        mesh,
        f"Checkpoint {number} in {run.checkpoints.folder}",
        "Delete that, and the run goes on from the one before.",
    )
    state.train = _offloaded(run, train)
    undone = number == state.rolled_back_to
    if state.update or not undone:
        state.experience = run.checkpoints.experience(number, mesh)
    has = state.experience is not None
    assert has or not state.update, f"checkpoint {number} lacks its rollout"
    return None if undone else run.checkpoints.ahead(number, mesh)


def refresh_reference(run: Run, state: RunState) -> None:
    """Moves the reference towards the policy, if that is due after the finished step."""
    every = run.course.refresh_every
    if not every or state.step % every:
        return
    with phase("update"):
        old = transfer.to_device_memory(state.reference)  # a copy of one in host memory
        mixed = run.refresh_reference(state.train.params, old)
        state.reference, state.refreshed = _kept_reference(run, mixed), state.refreshed + 1


def _kept_reference(run: Run, reference: Params) -> Params:
    """The reference where it is kept while it does not score."""
    is_offloaded = run.config.model.offload_reference
    return transfer.to_host_memory(reference) if is_offloaded else reference


def _reference_like(run: Run) -> Params:
    """Shapes, dtypes and shardings of the reference of a run that refreshes it."""
    dtype = jnp.dtype(run.config.model.dtype)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        policy.param_like(run.policy.model, run.mesh),
    )


def sizes(run: Run) -> dict[str, Any]:
    """The packed row sizes for which the run's programs are compiled so far, by program."""
    return {name: used.as_json() for name, used in run.sizes.items()}


def save(
    run: Run,
    state: RunState,
    *,
    quality: float | None = None,
    sizes_then: dict[str, Any] | None = None,
) -> None:
    """Begins a checkpoint of the state.

    `quality`: as for `Checkpoints.save`. `sizes_then`: the packed row sizes, if not the present
    ones.
    """
    every = run.course.save_every
    if state.step and not state.update and every and state.step % every == 0:
        state.last_due = state.step * run.course.updates
    state.sizes = sizes(run) if sizes_then is None else sizes_then
    waiting = state.next_rollout
    if waiting is not None and waiting.draws is not None:
        waiting = None  # the rewards of groups that are left out are not kept: it is sampled again
    state.next_rollout_s = 0.0 if waiting is None else waiting.seconds
    state.next_problems = [] if waiting is None else [int(p) for p in waiting.problem_P]
    given_up = None if waiting is None else waiting.given_up
    state.next_given_up = [] if given_up is None else given_up.as_json()
    facts = {
        "state": state.as_json(),
        "config": record.binding(run.config),
        "read": run.read,
    }
    run.checkpoints.save(
        state.train,
        facts,
        experience=state.experience,
        ahead=None if waiting is None else transfer.shard_rows(run.mesh, waiting.completions),
        reference=state.reference if state.refreshed else None,
        quality=quality,
    )


def _read(run: Run, number: int) -> tuple[RunState, dict[str, Any]]:
    """The state in a checkpoint without arrays, and the options that the checkpoint requires."""
    facts = run.checkpoints.facts(number)
    if "state" not in facts:
        raise ValueError(
            f"Checkpoint {number} in {run.checkpoints.folder} is of an earlier version of "
            "grpo_jax, whose runs this one cannot continue. Continue it with that version, or "
            "begin another run with --workdir DIR."
        )
    history, rates = facts["state"].pop("history"), facts["state"].pop("pass_rates", None)
    state = RunState(**facts["state"], history=History(**history))
    state.pass_rates = None if rates is None else PassRates.from_json(rates)
    state.checkpoint = number
    return state, facts["config"]


def _offloaded(run: Run, train: TrainState) -> TrainState:
    if not run.config.optim.offload:
        return train
    if run.critic is not None:
        train = train.replace(critic=_in_host_memory(train.critic))
    return _in_host_memory(train)


def _in_host_memory(train: TrainState) -> TrainState:
    return train.replace(opt_state=transfer.to_host_memory(train.opt_state))
