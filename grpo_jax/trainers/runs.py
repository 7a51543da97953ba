"""What a run is made of, whatever it trains by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.environments.questions import Questions
from grpo_jax.learner.experience import Prepare
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.update import Update
from grpo_jax.models import lora
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.pool import Pool
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup.inputs import Sums
from grpo_jax.structs import Params, TrainState
from grpo_jax.trainers.listeners import Callback


@dataclasses.dataclass(frozen=True)
class Course:
    """How many steps a run makes, what a step is, what is due after it, and how it is called."""

    num_steps: int
    prompts: int  # of a step
    minibatches: int = 1
    updates: int = 1  # of a step
    evaluate_every: int = 0  # steps; 0: before the first and after the last alone
    save_every: int = 0  # steps; 0: after the last alone
    samples_every: int = 0  # steps between those whose completions are shown; 0: none
    is_asynchronous: bool = False  # samples a step ahead
    profiled: tuple[int, ...] = ()  # first and last step of a trace
    is_tracked: bool = False  # its metrics go to the trackers that are asked for
    step: str = "step"  # in what a person reads
    bar: str = "step"  # the same at a line's beginning
    shown_every: int = 10  # steps, where there is no terminal
    update_phase: str = "update"  # one of `phases.PHASES`
    loss: str = "policy/loss"  # the metric
    learning_rate: str = "optim.learning_rate"  # the option


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of; none of it changes while it runs but for `sizes`."""

    config: ConfigDict
    course: Course
    folder: Path
    mesh: Mesh
    policy: Policy
    train: Questions
    held_out: Questions | None  # None: the policy is not evaluated
    rewards: Pool | None  # None: where it is not, and learns from no reward
    engine: Engine | None  # None: it learns from given completions
    evaluator: Engine | None  # the policy is judged as it is, however rollouts are drawn
    optimizer: optax.GradientTransformation
    learning_rate: Callable  # program: of an update by its number
    prepare: Prepare
    update: Update
    sizes: dict[str, CompiledSizes]  # of packed rows, of the programs of these two
    frozen: Params | None  # what does not learn, where adapters do
    ref_params: Params | None
    checkpoints: Checkpoints
    read: Sums  # what the run reads
    callbacks: tuple[Callback, ...] = ()  # of the program that started it

    def weights(self, state: TrainState) -> Params:
        """What the network reads: of adapters, with the frozen weights that they stand beside."""
        return lora.attached(self.frozen, state.params, self.policy.model)

    def evaluates_after(self, step: int) -> bool:
        """Whether the policy is evaluated after a step."""
        every, is_last = self.course.evaluate_every, step == self.course.num_steps
        return bool(self.held_out) and (is_last or bool(every and step % every == 0))

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        every, is_last = self.course.save_every, step == self.course.num_steps
        return is_last or bool(every and step % every == 0)
