"""Builds a run of GRPO from its config: reads, checks, and sets up."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.config import derived, guard_rules, rules
from grpo_jax.devices import sharding, transfer
from grpo_jax.environments.demonstrations import NOTHING, Nothing
from grpo_jax.environments.episode import Dialogue
from grpo_jax.environments.questions import Questions
from grpo_jax.learner.actor_critic import ActorCriticUpdate
from grpo_jax.learner.update import Update
from grpo_jax.messages.console import say
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.registry import Reward
from grpo_jax.run import workdir
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.setup import critic as critic_lib
from grpo_jax.setup import demonstrations, inputs, lora, model, reward_models, teacher
from grpo_jax.setup import environment as environment_lib
from grpo_jax.setup.data import answerable, load_problems, questions, tell_of, tell_of_few
from grpo_jax.setup.engine import make_engine, make_evaluator
from grpo_jax.setup.environment import Environment
from grpo_jax.setup.learner import Learner, MemoryPlan, make_learner
from grpo_jax.setup.rewards import load_rewards, refuse_samples, start_rewards
from grpo_jax.setup.run_folder import open_for
from grpo_jax.structs import ModelConfig, Params
from grpo_jax.trainers import tracking
from grpo_jax.trainers.runs import Course, Run


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a run, checked against each other; weights are not read yet."""

    mesh: Mesh
    rewards: list[Reward]
    policy: Policy
    train: Questions
    held_out: Questions | None  # None: nothing to evaluate with
    sums: inputs.Sums
    demonstrations: Nothing = NOTHING  # of the training problems
    teacher: Policy | None = None  # None: there is none
    critic: Policy | None = None  # the model that a critic begins with; None: there is no critic
    environment: Environment | None = None  # None: completions are of one turn
    dialogues: dict[str | None, Dialogue] = dataclasses.field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest training prompt."""
        return max(map(len, self.train.prompt_ids))


def read(
    config: ConfigDict,
    get_policy: Callable[[], Policy],
    opened: Callable[[], datetime],
    kept: Path | None = None,
) -> Inputs:
    """Reads and checks the inputs of a run; ValueError for those that do not fit.

    `opened` opens the run's folder, if there is one, and returns the date for chat templates. It is
    called once model, devices, rewards and problems fit each other. `kept`: the run's copy of
    lora.path; that of the critic's model lies beside it.
    """
    mesh, rewards = _devices_and_rewards(config)
    environment, rewards = _environment_and_rewards(config, rewards)
    policy = get_policy().within(derived.longest_row(config))
    policy = lora.adapted_policy(policy, config, kept)
    critic = critic_lib.read(config, policy, kept)
    for found in filter(None, (policy, critic)):
        heads = found.model.num_heads
        rules.check_heads(heads, mesh.shape["sequence"], mesh.shape["tensor"])
    train, held_out = (answerable(config, rewards, part) for part in load_problems(config))
    tell_of(config, train, held_out)
    tell_of_few(config, train)
    if environment is not None:
        limit_s = config.environment.tool_timeout_s
        train, held_out = (environment.asked(part, limit_s) for part in (train, held_out))
    now = opened()
    dialogues = {}
    if environment is not None:
        dialogues = environment_lib.dialogues(config, environment, policy, train, now)
    asked = questions(train, policy, config, "training problems", now)
    most = config.rollout.max_tokens + derived.longest_hint(config)
    policy.check_length(asked.prompt_ids, most)
    given = demonstrations.load(config, policy, asked.problems)
    taught_by = teacher.read(config, policy)
    sums = inputs.of_run(asked.problems, asked.prompt_ids, held_out, policy, rewards)
    sums |= inputs.of_adapter(config.lora.path) | inputs.of_critic(config.critic.path, critic)
    if taught_by is not None:
        taught_by.check_length(asked.prompt_ids, most)
        sums |= {"teacher": inputs.of_model(taught_by)}
    kept = held_out[: config.evaluation.num_problems] if rewards else []
    evaluated = questions(kept, policy, config, "held-out problems", now) if kept else None
    if evaluated:
        policy.check_length(evaluated.prompt_ids, config.rollout.max_tokens)
    return Inputs(
        mesh, rewards, policy, asked, evaluated, sums, given, taught_by, critic, environment,
        dialogues,
    )  # fmt: skip


def settled(config: ConfigDict, num_problems: int) -> ConfigDict:
    """The config with its number of steps, for `num_problems` training problems.

    Raises ValueError if options need more problems.
    """
    if not config.loop.num_epochs:
        return config
    found = copy.deepcopy(config).unlock()
    found.loop.num_steps = derived.num_steps(config, num_problems)
    in_steps = copy.deepcopy(found)
    in_steps.loop.num_epochs = 0.0
    rules.check(in_steps)
    return found.lock()


def refuse_early(config: ConfigDict, folder: Path) -> None:
    """Raises ValueError early for errors that `run` would find only after training a new model."""
    mesh, rewards = _devices_and_rewards(config)
    environment, rewards = _environment_and_rewards(config, rewards)
    policy = model.new_policy(config)
    policy = lora.adapted_policy(policy, config)
    critic_lib.read(config, policy)
    rules.check_heads(policy.model.num_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    train, held_out = load_problems(config)
    settled(config, len(train))
    for problems in (train, held_out):
        answerable(config, rewards, problems)
        if environment is not None:
            environment.asked(problems, config.environment.tool_timeout_s)
        if problems:
            texts = [p.prompt for p in problems if isinstance(p.prompt, str)] or [""]
            ids = policy.tokenizer(texts)["input_ids"]
            policy.check_length(ids, config.rollout.max_tokens + derived.longest_hint(config))
    demonstrations.load(config, policy, answerable(config, rewards, train))
    teacher.read(config, policy)
    if environment is not None:
        environment.close()
    open_for(config, folder)


def _devices_and_rewards(config: ConfigDict) -> tuple[Mesh, list[Reward]]:
    """The mesh and the reward functions; ValueError if one is unavailable or does not fit."""
    if config.data.streaming:
        raise ValueError(
            "data.streaming = True is of training on given completions, as grpo_jax.sft. GRPO "
            "draws its problems by their numbers, and holds them in memory. Set it to False."
        )
    mesh = sharding.make_mesh(**config.mesh)
    rules.check_devices(config, sharding.num_row_shards(mesh))
    _check_host_memory(config, mesh)
    tracking.check(config)
    return mesh, load_rewards(config)


def _environment_and_rewards(
    config: ConfigDict, rewards: list[Reward]
) -> tuple[Environment | None, list[Reward]]:
    """The environments, if there are any, and the rewards with those that they give."""
    environment = environment_lib.read(config, rewards)
    rewards = rewards if environment is None else environment.rewards
    try:
        refuse_samples(rewards, config.evaluation.num_samples, "evaluation.num_samples")
    except ValueError:
        if environment is not None:
            environment.close()
        raise
    return environment, rewards


def _course(config: ConfigDict) -> Course:
    return Course(
        num_steps=config.loop.num_steps,
        prompts=config.batch.prompts,
        minibatches=config.batch.minibatches,
        updates=derived.num_updates_per_step(config),
        refresh_every=config.algorithm.reference_refresh_steps,
        evaluate_every=config.evaluation.every_steps,
        save_every=config.checkpoint.every_steps,
        samples_every=config.logging.samples_every_steps,
        is_asynchronous=config.loop.async_rollouts,
        critic_steps=config.critic.first_steps if config.algorithm.critic else 0,
        profiled=config.profile.steps,
        is_tracked=True,
    )


def build(
    config: ConfigDict,
    folder: Path,
    model_path: str,
    fit: Callable[[ConfigDict, ModelConfig, Mesh, int, Path], MemoryPlan],
) -> Run:
    """The run, read, checked and set up, without the policy's weights.

    `fit` returns how to cut the update for the longest prompt.
    """

    def opened() -> datetime:
        open_for(config, folder)
        return inputs.date(config.data.date, folder)

    source = folder / "source"
    kept = folder / lora.KEPT
    found = read(config, lambda: policy_lib.read(model_path, kept=source), opened, kept)
    inputs.hold(folder, found.sums, config.checkpoint.accept_changes)
    config = settled(config, len(found.train.problems))
    policy = policy_lib.keep(found.policy, source)
    critic = critic_lib.keep(config, found.critic, folder)
    lora.keep(config, folder)
    mesh = found.mesh
    now = inputs.date(config.data.date, folder)
    models = reward_models.load_all(config, found.rewards, mesh, now)
    fitted = fit(config, policy.model, mesh, found.longest, folder)
    learner = _learner(config, found, mesh, fitted)
    engine = make_engine(config, policy.model, policy.stop_ids, mesh)
    for line in told(config, found):
        say(line)
    say(f"Seed {config.seed}, workdir {folder}")
    frozen = lora.frozen_params(policy, mesh, config.model.dtype)
    own, update = _critic(config, critic, learner, policy, frozen, folder)
    return Run(
        config=config,
        course=_course(config),
        folder=folder,
        mesh=mesh,
        policy=policy,
        train=found.train,
        held_out=found.held_out,
        engine=engine,
        evaluator=make_evaluator(config, engine),
        optimizer=learner.optimizer,
        learning_rate=learner.learning_rate,
        prepare=learner.prepare,
        update=update,
        sizes=learner.sizes | (models.sizes if models else {}),
        frozen=frozen,
        checkpoints=Checkpoints(
            config.checkpoint.folder or folder / "checkpoints",
            keep=config.checkpoint.keep,
            max_failed=config.checkpoint.max_failed,
            on_saved=functools.partial(workdir.note_saved, folder),
            due_every=guard_rules.may_roll_back(config)
            * config.checkpoint.every_steps
            * derived.num_updates_per_step(config),
        ),
        read=found.sums,
        first_reference=functools.partial(_reference, config, policy, mesh, frozen, kept),
        refresh_reference=learner.refresh_reference,
        demonstrations=found.demonstrations,
        drawing=environment_lib.drawing_of_run(config, found.environment, found.dialogues),
        critic=own,
        controllers=learner.controllers,
        # Last: no more checks follow.
        rewards=start_rewards(config, found.rewards, models=models, folder=folder),
    )


def _critic(
    config: ConfigDict,
    critic: Policy | None,
    learner: Learner,
    policy: Policy,
    frozen: Params | None,
    folder: Path,
) -> tuple[critic_lib.States | None, Update | ActorCriticUpdate]:
    """What makes the critic's states, if there is one, and the update, with its frozen weights."""
    if critic is None:
        return None, learner.update
    how = learner.scorer.mesh, learner.critic.optimizer
    states = critic_lib.states(config, critic, *how, policy, frozen, folder)
    return states, dataclasses.replace(learner.update, critic_frozen=states.frozen)


def _learner(config: ConfigDict, found: Inputs, mesh: Mesh, fitted: MemoryPlan) -> Learner:
    """The learner, with the weights of its teacher if it has one."""
    critic, taught_by = found.critic, found.teacher
    shapes = critic and critic.model, taught_by and taught_by.model
    learner = make_learner(config, found.policy.model, mesh, fitted, *shapes)
    if taught_by is None:
        return learner
    weights = teacher.load(config, taught_by, mesh)
    prepare, update = teacher.given_to(learner.prepare, learner.update, weights)
    return dataclasses.replace(learner, prepare=prepare, update=update)


def told(config: ConfigDict, found: Inputs) -> list[str]:
    """A description of the run: its model, problems, and steps."""
    model, batch, lengths = found.policy.model, config.batch, [*map(len, found.train.prompt_ids)]
    updates = derived.num_updates_per_step(config)
    held_out = len(found.held_out.problems) if found.held_out else 0
    asked = batch.prompts if config.prompts.drop_equal_groups else derived.prompts_begun(config)
    return [
        f"Model: {model.family}, {model.num_params:,} parameters, {config.model.dtype}, from "
        f"{config.model.path or 'the supervised start'}",
        f"Problems: {len(lengths):,} to train on, {held_out:,} held out; prompts of "
        f"{sorted(lengths)[len(lengths) // 2]} tokens, the longest of {found.longest}",
        *lora.told(config, model),
        *critic_lib.told(found.critic),
        f"A step: {batch.prompts} prompts x {batch.group} completions of at most "
        f"{config.rollout.max_tokens} tokens, {updates} update{'s' * (updates > 1)}",
        *_draws(config),
        *demonstrations.told(config),
        *teacher.told(config, found.teacher),
        f"The run: {config.loop.num_steps:,} steps, which ask "
        f"{_problems(config, config.loop.num_steps * asked, len(lengths))}"
        f"{' or more' * config.prompts.drop_equal_groups}",
    ]


def _problems(config: ConfigDict, asked: int, number: int) -> str:
    """How many of the training problems a run asks, or how often it asks each."""
    if asked < number and not derived.follows_pass_rates(config):
        return f"{asked:,} of the {number:,} problems"
    return f"each problem {asked / number:,.2f} times"


def _draws(config: ConfigDict) -> list[str]:
    """Describes how a step's batch is filled, if groups are dropped or over-sampled."""
    number, told = derived.prompts_per_draw(config), []
    if config.prompts.drop_equal_groups:
        told.append(
            f"Its prompts are those whose rewards differ, of up to {config.prompts.max_draws} "
            f"draws of {number} prompts"
        )
    if config.prompts.oversample > 1:
        told.append(
            f"A draw begins {derived.prompts_begun(config)} prompts, and ends once {number} groups "
            "are finished"
        )
    return told


def _reference(
    config: ConfigDict, policy: Policy, mesh: Mesh, frozen: Params | None, kept: Path
) -> Params | None:
    """The first reference of the KL term; None: the loss has no such term."""
    if not config.algorithm.kl_coef:
        return None
    return model.first_reference(config, policy, mesh, frozen, kept)


def _check_host_memory(config: ConfigDict, mesh: Mesh) -> None:
    wanted = {
        "optim.offload": config.optim.offload,
        "model.offload_reference": config.model.offload_reference,
    }
    for option, value in wanted.items():
        if value:
            transfer.check_host_memory(mesh, option)
