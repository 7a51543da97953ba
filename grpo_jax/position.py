"""Where a run stands: at its start, at a checkpoint, or back at one that it was rolled back to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from grpo_jax import config as config_lib
from grpo_jax import inputs, rules, sharding
from grpo_jax import metrics as metrics_lib
from grpo_jax import policy as policy_lib
from grpo_jax.algorithm import update as update_lib
from grpo_jax.guards import History
from grpo_jax.parts import Parts
from grpo_jax.structs import Experience, Rollouts, TrainState


@dataclasses.dataclass
class Position:
    """Where a run stands, besides its train state; what a checkpoint keeps of it as JSON.

    Metrics of step n, counted from 1, describe its rollout and the policy after its updates; step 0
    is the model as it was given.
    """

    step: int = 0  # rollouts finished
    update: int = 0  # updates done on the rollout of `step`
    prompts: int = 0  # consumed
    tokens: int = 0  # generated
    wall_s: float = 0.0
    ahead_s: float = 0.0  # that sampling the completions took that wait in the checkpoint
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

    def draw_of(self, step: int) -> int:
        """The number of the draw that gives a step its prompts and its random key."""
        return step + self.passed_over


def newest(parts: Parts) -> Position:
    """Where the run stands: at its newest checkpoint, or where there is none at its start.

    Raises ValueError where the checkpoint is of another config.
    """
    number = parts.checkpoints.latest()
    if number is None:
        return Position()
    at, config = _read(parts, number)
    if config != config_lib.fingerprint(parts.config):  # the workdir may be another
        raise ValueError(
            f"checkpoint.folder = {parts.config.checkpoint.folder!r} holds checkpoints of a "
            "different config. Give the run a folder of its own, or the options it was started "
            "with."
        )
    before = parts.checkpoints.facts(number).get("read")
    if before:
        inputs.refuse_other(before, parts.read, f"{parts.checkpoints.folder}")
    middle = f", between updates {at.update} and {at.update + 1}" if at.update else ""
    metrics_lib.say(f"Continuing {parts.folder} after step {at.step}{middle}.")
    return at


def roll_back(parts: Parts, at: Position, undone: int) -> Position:
    """Where to go on from once the steps up to `undone` went wrong: at a checkpoint before them.

    That is the newest one that was due when it was written, since one that a stop wrote would not
    be there in a run that was never stopped; or where that has been rolled back to before, the one
    before it, if it is kept. Where those that were due are gone it is the newest there is. Where
    none was due so far the run begins again. What is newer is deleted, nothing else. The draws of
    the undone steps are passed over, so that what led there does not come again (as Chowdhery et
    al. 2022, arXiv:2204.02311, section 5.1, do where the loss spikes).
    """
    back = _to_go_back_to(parts, at)
    if back is None:
        back = Position(first_evaluation=at.first_evaluation)
        back.accuracy_before = back.accuracy = at.accuracy_before
        back.held_out_reward_before = back.held_out_reward = at.held_out_reward_before
    for number in parts.checkpoints.numbers():
        if number > back.checkpoint:
            parts.checkpoints.delete(number)
    following = back.step + bool(back.update)  # step, from 0, that draws next
    back.passed_over = at.draw_of(undone) - following
    back.rolled_back_to, back.tokens = back.checkpoint, at.tokens
    back.history.roll_backs = at.history.roll_backs + 1
    metrics_lib.say(
        f"Going on after step {back.step}: steps {back.step + 1} to {undone} are undone."
    )
    return back


def _to_go_back_to(parts: Parts, at: Position) -> Position | None:
    """The position of an undamaged checkpoint, as `roll_back` chooses it; None: the start."""
    newest = again = None
    for number in reversed(parts.checkpoints.numbers()):
        if not parts.checkpoints.whole(number):
            continue
        found, _ = _read(parts, number)
        newest = newest or found
        if found.last_due == number:
            if number != at.rolled_back_to:
                return found
            again = found
    return again or (newest if at.last_due >= 0 else None)


def load(parts: Parts, at: Position) -> tuple[TrainState, Experience | None, Rollouts | None]:
    """The state there, what the run was learning from, and what it had sampled for the next step.

    The latter two where it was stopped with such; a roll-back leaves the last. Raises ValueError
    where the state has numbers that are not finite.
    """
    for name, sizes in parts.sizes.items():
        sizes.restore(at.sizes.get(name))
    model, mesh, optimizer = parts.policy.model, parts.mesh, parts.optimizer
    dtype, number = jnp.dtype(parts.config.model.param_dtype), at.checkpoint
    if number < 0:
        params = policy_lib.load_params(parts.policy, mesh, parts.config.seed, dtype)
        return _offloaded(parts, update_lib.start(params, model, mesh, optimizer)), None, None
    like = update_lib.state_like(model, mesh, optimizer, dtype)
    state = parts.checkpoints.restore(number, like)
    policy_lib.refuse_nonfinite(
        state,
        mesh,
        f"Checkpoint {number} in {parts.checkpoints.folder}",
        "Delete that, and the run goes on from the one before.",
    )
    state = _offloaded(parts, state)
    experience = parts.checkpoints.experience(number, mesh)
    assert (experience is not None) == (at.update > 0), f"checkpoint {number} lacks its rollout"
    undone = number == at.rolled_back_to
    return state, experience, None if undone else parts.checkpoints.ahead(number, mesh)


def facts(parts: Parts, at: Position) -> dict[str, Any]:
    """What a checkpoint there keeps besides arrays."""
    every = parts.config.checkpoint.every_steps
    if at.step and not at.update and every and at.step % every == 0:
        at.last_due = at.step * rules.num_updates_per_step(parts.config)
    at.sizes = {name: sizes.as_json() for name, sizes in parts.sizes.items()}
    config = config_lib.fingerprint(parts.config)
    return {"position": dataclasses.asdict(at), "config": config, "read": parts.read}


def _read(parts: Parts, number: int) -> tuple[Position, str]:
    """The position that a checkpoint holds, and the name of its config."""
    facts = parts.checkpoints.facts(number)
    history = History(**facts["position"].pop("history"))
    at = Position(**facts["position"] | {"history": history, "checkpoint": number})
    return at, facts["config"]


def _offloaded(parts: Parts, state: TrainState) -> TrainState:
    if not parts.config.optim.offload:
        return state
    return state.replace(opt_state=sharding.to_host_memory(state.opt_state))
