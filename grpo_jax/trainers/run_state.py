"""The state of a run: all that a checkpoint keeps, read from one, or taken back to an older."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from grpo_jax.config import record
from grpo_jax.devices import transfer
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.learner import train_state
from grpo_jax.messages.console import say
from grpo_jax.models import policy
from grpo_jax.run import workdir
from grpo_jax.setup import inputs, lora
from grpo_jax.structs import Experience, Rollouts, TrainState
from grpo_jax.trainers.guards import History
from grpo_jax.trainers.runs import Run


@dataclasses.dataclass
class RunState:
    """All that a checkpoint keeps of a run: arrays, and beside them numbers as JSON.

    Metrics of step n, counted from 1, describe its rollout and the policy after its updates; step 0
    is the model as it was given.
    """

    train: TrainState | None = None  # None: not read yet
    experience: Experience | None = None  # what the updates of `step` learn from; None: not there
    next_rollout: Rollout | None = None  # sampled, and not yet in `experience`
    step: int = 0  # rollouts finished
    update: int = 0  # updates done on the rollout of `step`
    prompts: int = 0  # consumed
    tokens: int = 0  # generated
    wall_s: float = 0.0
    next_rollout_s: float = 0.0  # that sampling the completions took that wait in the checkpoint
    checkpoint: int = -1  # number of the one that this was read from; -1: none
    last_due: int = -1  # the same of the newest that checkpoint.every_steps asked for
    passed_over: int = 0  # draws that were undone: their prompts and keys do not come again
    rolled_back_to: int = -1  # the same of the last roll-back
    history: History = dataclasses.field(default_factory=History)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of packed rows, by program
    accuracy_before: float | None = None
    accuracy: float | None = None  # newest
    held_out_reward_before: float | None = None
    held_out_reward: float | None = None  # newest
    first_evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    rollout_metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of `step`
    update_metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)  # the same
    # Where the run was stopped before the evaluation after `step`: what that step's line has so far
    unevaluated: dict[str, float] = dataclasses.field(default_factory=dict)

    def draw_of(self, step: int) -> int:
        """The number of the draw that gives a step its prompts and its random key."""
        return step + self.passed_over

    @property
    def sampled(self) -> int:
        """Steps that have been sampled and rewarded: the finished ones, and one in its updates."""
        return self.step + (self.experience is not None)

    def finish_step(self) -> None:
        """All updates on this rollout are done: what belongs to it goes."""
        self.step, self.update, self.experience = self.step + 1, 0, None
        self.rollout_metrics, self.update_metrics = {}, []

    def as_json(self) -> dict[str, Any]:
        """Everything but the arrays."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in fields.items() if n not in _ARRAYS} | {
            "history": dataclasses.asdict(self.history)
        }


_ARRAYS = ("train", "experience", "next_rollout")


def newest(run: Run) -> RunState:
    """Where the run stands: at its newest checkpoint, or where there is none at its start.

    Raises ValueError where the checkpoint is of another config, and where the run had checkpoints
    that are gone.
    """
    again, folder = run.config.checkpoint.begin_again, run.checkpoints.folder
    number = run.checkpoints.latest(begin_again=again)
    if number is None:
        workdir.begin(run.folder, folder, again=again)
        return RunState()
    state, binding = _read(run, number)
    accepted = record.accepted(run.folder)
    record.refuse(  # the workdir may be another
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
    """Where to go on from once the steps up to `undone` went wrong: at a checkpoint before them.

    That is the newest one that was due when it was written, since one that a stop wrote would not
    be there in a run that was never stopped; or where that has been rolled back to before, the one
    before it, if it is kept. Where those that were due are gone it is the newest there is. Where
    none was due so far the run begins again. What is newer is deleted, nothing else. The draws of
    the undone steps are passed over, so that what led there does not come again (as Chowdhery et
    al. 2022, arXiv:2204.02311, section 5.1, do where the loss spikes).
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
    following = back.step + bool(back.update)  # step, from 0, that draws next
    back.passed_over = state.draw_of(undone) - following
    back.rolled_back_to, back.tokens = back.checkpoint, state.tokens
    back.history.roll_backs = state.history.roll_backs + 1
    say(f"Going on after step {back.step}: steps {back.step + 1} to {undone} are undone.")
    return back


def _to_go_back_to(run: Run, state: RunState) -> RunState | None:
    """The position of an undamaged checkpoint, as `roll_back` chooses it; None: the start."""
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
    """Reads the arrays of a state; gives the completions that were sampled for its next step.

    None where none were, and after a roll-back, which undoes an experience too that nothing was
    learned from. Raises ValueError where the parameters
    or the optimizer's state have numbers that are not finite.
    """
    for name, sizes in run.sizes.items():
        sizes.restore(state.sizes.get(name))
    model, mesh, optimizer = run.policy.model, run.mesh, run.optimizer
    dtype, number = jnp.dtype(run.config.model.param_dtype), state.checkpoint
    if number < 0:
        params = lora.first_params(run.config, run.policy, mesh, run.folder / lora.KEPT)
        state.train = _offloaded(run, train_state.start(params, model, mesh, optimizer))
        return None
    like = train_state.state_like(model, mesh, optimizer, dtype)
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


def sizes(run: Run) -> dict[str, Any]:
    """The sizes of packed rows that the run's programs are compiled for so far, by program."""
    return {name: used.as_json() for name, used in run.sizes.items()}


def save(
    run: Run,
    state: RunState,
    *,
    quality: float | None = None,
    sizes_then: dict[str, Any] | None = None,
) -> None:
    """Begins a checkpoint of the state.

    `quality`: as `Checkpoints.save` has it. `sizes_then`: of packed rows, where they are not those
    of now.
    """
    every = run.course.save_every
    if state.step and not state.update and every and state.step % every == 0:
        state.last_due = state.step * run.course.updates
    state.sizes = sizes(run) if sizes_then is None else sizes_then
    waiting = state.next_rollout
    state.next_rollout_s = 0.0 if waiting is None else waiting.seconds
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
        quality=quality,
    )


def _read(run: Run, number: int) -> tuple[RunState, dict[str, Any]]:
    """The state that a checkpoint holds, without its arrays; and the options that bind it."""
    facts = run.checkpoints.facts(number)
    if "state" not in facts:
        raise ValueError(
            f"Checkpoint {number} in {run.checkpoints.folder} is of an earlier version of "
            "grpo_jax, whose runs this one cannot continue. Continue it with that version, or "
            "begin another run with --workdir DIR."
        )
    history = History(**facts["state"].pop("history"))
    state = RunState(**facts["state"] | {"history": history, "checkpoint": number})
    return state, facts["config"]


def _offloaded(run: Run, train: TrainState) -> TrainState:
    if not run.config.optim.offload:
        return train
    return train.replace(opt_state=transfer.to_host_memory(train.opt_state))
