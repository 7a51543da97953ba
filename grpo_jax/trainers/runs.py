"""The parts of a run, for every way of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.environments.demonstrations import NOTHING, Nothing
from grpo_jax.environments.drawing import ONE_TURN, OneTurn
from grpo_jax.environments.questions import Questions
from grpo_jax.learner.actor_critic import ActorCriticUpdate
from grpo_jax.learner.experience import Prepare
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.update import Update
from grpo_jax.models import lora
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.pool import Pool
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import critic as critic_lib
from grpo_jax.setup.inputs import Sums
from grpo_jax.setup.learner import Controller
from grpo_jax.structs import Params, TrainState
from grpo_jax.trainers.listeners import Callback


@dataclasses.dataclass(frozen=True)
class Course:
    """The schedule of a run: number and size of steps, events after a step, and names in output."""

    num_steps: int
    prompts: int  # of a step
    minibatches: int = 1
    updates: int = 1  # of a step
    refresh_every: int = 0  # steps between refreshes of the reference; 0: none
    evaluate_every: int = 0  # steps; 0: only before the first and after the last
    save_every: int = 0  # steps; 0: only after the last
    samples_every: int = 0  # steps between shown samples; 0: none
    is_asynchronous: bool = False  # samples a step ahead
    critic_steps: int = 0  # first ones, in which a critic learns and the policy does not
    profiled: tuple[int, ...] = ()  # first and last step of a trace
    is_tracked: bool = False  # its metrics go to the config's trackers
    step: str = "step"  # name of a step in messages
    bar: str = "step"  # name in the progress line
    shown_every: int = 10  # steps, without a terminal
    update_phase: str = "update"  # one of `phases.PHASES`
    loss: str = "policy/loss"  # the metric
    held_out_loss: str = ""  # the metric of held-out data, if their completions are given
    learning_rate: str = "optim.learning_rate"  # the option


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run; only `sizes` changes during the run."""

    config: ConfigDict
    course: Course
    folder: Path
    mesh: Mesh
    policy: Policy
    train: Questions
    held_out: Questions | None  # None: the policy answers no held-out problems
    rewards: Pool | None  # None: neither training nor evaluation uses rewards
    engine: Engine | None  # None: completions are given
    evaluator: Engine | None  # exact, even if rollouts use 8 bits
    optimizer: optax.GradientTransformation
    learning_rate: Callable  # program: learning rate by update number
    prepare: Prepare
    update: Update | ActorCriticUpdate
    sizes: dict[str, CompiledSizes]  # packed row sizes of both programs
    frozen: Params | None  # frozen weights under adapters
    checkpoints: Checkpoints
    read: Sums  # checksums of the run's inputs
    first_reference: Callable[[], Params | None] = lambda: None  # reads it; None: no KL term
    refresh_reference: Callable | None = None  # program; None: the reference is fixed
    drawing: OneTurn = ONE_TURN  # how completions are drawn
    demonstrations: Nothing = NOTHING  # of the training problems, in the groups of a step
    controllers: tuple[Controller, ...] = ()  # of coefficients that change after each step
    callbacks: tuple[Callback, ...] = ()  # of the program that started it
    critic: critic_lib.States | None = None  # None: advantages are of completions
    # Metrics of held-out data whose completions are given, by (run, state, alive); None: no such.
    measure: Callable[[Run, Any, Callable[[], None]], dict[str, float]] | None = None
    measuring: Prepare | None = None  # scores the completions that `measure` reads

    def weights(self, state: TrainState) -> Params:
        """The weights that the network reads: adapters attached to their frozen weights."""
        return lora.attached(self.frozen, state.params, self.policy.model)

    def critic_weights(self, state: TrainState) -> Params | None:
        """The weights of the critic, if there is one."""
        return None if self.critic is None else self.critic.weights(state.critic)

    def update_of(self, step: int) -> Callable:
        """The update of a step, counted from 0: of all that learns, or of the critic alone."""
        return self.update if step >= self.course.critic_steps else self.update.warming

    @property
    def is_evaluated(self) -> bool:
        return self.held_out is not None or self.measure is not None

    def evaluates_after(self, step: int) -> bool:
        """Whether the policy is evaluated after a step."""
        every, is_last = self.course.evaluate_every, step == self.course.num_steps
        return self.is_evaluated and (is_last or bool(every and step % every == 0))

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        every, is_last = self.course.save_every, step == self.course.num_steps
        return is_last or bool(every and step % every == 0)
