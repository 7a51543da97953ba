"""What a run is made of, read, checked and put together from its config."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import cpus as cpus_lib
from grpo_jax import evaluation, guards, inputs, optim, rules, sharding, workdir
from grpo_jax import metrics as metrics_lib
from grpo_jax import policy as policy_lib
from grpo_jax.algorithm import losses
from grpo_jax.algorithm import update as update_lib
from grpo_jax.algorithm.rows import Sizes
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.data import notes, tasks
from grpo_jax.data import problems as problems_lib
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.models import kernels
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.rewards import reward as reward_lib
from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import ModelConfig, Params, Sampling


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of; none of it changes while it runs but for `sizes`."""

    config: ConfigDict
    folder: Path
    mesh: Mesh
    policy: policy_lib.Policy
    train: evaluation.Questions
    held_out: evaluation.Questions | None
    rewards: Pool
    engine: Engine
    evaluator: Engine  # the policy is judged as it is, however rollouts are drawn
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    prepare: update_lib.Prepare
    update: Callable
    sizes: dict[str, Sizes]  # of packed rows, of the programs of these two
    ref_params: Params | None
    checkpoints: Checkpoints
    read: inputs.Sums  # what the run reads

    @property
    def updates_per_step(self) -> int:
        return rules.num_updates_per_step(self.config)

    def evaluates_after(self, step: int) -> bool:
        """Whether the policy is evaluated after a step."""
        every, is_last = self.config.evaluation.every_steps, step == self.config.loop.num_steps
        return bool(self.held_out) and (is_last or bool(every and step % every == 0))

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        every, is_last = self.config.checkpoint.every_steps, step == self.config.loop.num_steps
        return is_last or bool(every and step % every == 0)


def refuse_early(config: ConfigDict, folder: Path) -> None:
    """Raises ValueError for what `run` would refuse of a new model only once that is trained."""
    mesh = sharding.make_mesh(**config.mesh)
    rules.check_devices(config, sharding.num_row_shards(mesh))
    _check_host_memory(config, mesh)
    rewards = load_rewards(config)
    evaluation.refuse_samples(rewards, config.evaluation.num_samples, "evaluation.num_samples")
    for problems in load_problems(config):
        answerable(config, rewards, problems)
    policy = policy_lib.new(config.model, tasks.load(config.data.task).make_tokenizer())
    rules.check_heads(policy.model.num_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    policy.check_length(config.data.max_prompt_tokens, config.rollout.max_tokens)
    workdir.open_for(config, folder)


def model_shape(config: ConfigDict, folder: Path | None = None) -> ModelConfig:
    """The shape of the model that the config trains, in a run's folder if one is given."""
    if config.model.path:
        kept = None if folder is None else folder / "source"
        path = config.model.path
        return folder_lib.read_config(policy_lib.find(path, kept=kept), folder_lib.as_given(path))
    return policy_lib.new(config.model, tasks.load(config.data.task).make_tokenizer()).model


def load_problems(config: ConfigDict) -> tuple[list, list]:
    """Training and held-out problems of the config's task or files; the second may be empty."""
    data = config.data
    if data.task:
        return tasks.load(data.task).generate(data.num_train, data.num_eval, config.seed)
    return problems_lib.load_train(data), problems_lib.load_held_out(data)


def load_rewards(config: ConfigDict) -> list[reward_lib.Reward]:
    """The config's reward functions; ValueError where one cannot be had."""
    options = config.rewards
    return reward_lib.load(
        options.names, options.weights, options.accuracy, start_limit_s=options.start_limit_s
    )


def tell_of(config: ConfigDict, train: list, held_out: list) -> None:
    """Says what a person should know of the problems, such as that some stand there twice."""
    for note in notes.of_problems(train, held_out, problems_lib.form_of(config.data)):
        metrics_lib.say(f"warning: {note}")


def answerable(config: ConfigDict, rewards: list[reward_lib.Reward], problems: list) -> list:
    """The problems that all rewards can score.

    Raises ValueError where there are others and `rewards.bad_rows` refuses them, where none is
    left, and where a column is missing.
    """
    reward_lib.refuse_columns(rewards, problems)
    faults = reward_lib.faulty_rows(rewards, problems)
    if not faults:
        return problems
    first = next(iter(faults.values()))
    if config.rewards.bad_rows == "refuse" or len(faults) == len(problems):
        raise ValueError(
            f"{first} {len(faults)} of {len(problems)} rows are such. Mend them, or leave them out "
            'with rewards.bad_rows = "drop".'
        )
    metrics_lib.say(f"{len(faults)} of {len(problems)} problems are left out. The first: {first}")
    return [problem for i, problem in enumerate(problems) if i not in faults]


def start_rewards(
    config: ConfigDict, rewards: list[reward_lib.Reward], *, device_is_busy: bool = True
) -> Pool:
    """The rewards' worker processes: on half of the CPUs, or all while no device computes."""
    options, cpus = config.rewards, cpus_lib.usable()
    return Pool(
        rewards,
        max_completion_tokens=config.rollout.max_tokens,
        num_workers=options.num_workers or min(max(cpus // (1 + device_is_busy), 1), 16),
        limits=Limits(options.time_limit_s, int(options.memory_gb * 2**30), options.start_limit_s),
    )


def encode(
    problems: list,
    policy: policy_lib.Policy,
    config: ConfigDict,
    noun: str,
    now: datetime,
) -> prompts_lib.Encoded:
    """The problems' prompts as tokens; prints how many were dropped or truncated, if any.

    `now`: the time that chat templates are told.
    """
    limit, overlong = config.data.max_prompt_tokens, config.data.overlong
    encoded = prompts_lib.encode(
        problems, policy.tokenizer, limit, overlong, now=now, on_text=_Slow().tell
    )
    for problem, ids in zip(encoded.problems, encoded.prompt_ids):
        policy.refuse_unknown(ids, f"The prompt of {problem.where or 'an unnamed problem'}")
    form = problems_lib.form_of(config.data)
    for note in notes.of_template(encoded.problems, encoded.reads, form):
        metrics_lib.say(f"warning: {note}")
    number = encoded.num_dropped or encoded.num_truncated
    if number:
        done = "dropped" if encoded.num_dropped else "truncated"
        metrics_lib.say(
            f"{number:,} of {len(problems):,} {noun} have prompts of more than "
            f"data.max_prompt_tokens = {limit} tokens: {done}."
        )
    return encoded


class _Slow:
    """Says how far a chat template is that takes long."""

    _EVERY_S = 10.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > self._EVERY_S:
            self._last = time.monotonic()
            metrics_lib.say(f"The chat template has written {done:,} of {total:,} prompts.")


def questions(
    problems: list,
    policy: policy_lib.Policy,
    config: ConfigDict,
    noun: str,
    now: datetime,
) -> evaluation.Questions:
    """The problems as the policy reads them, those with a prompt that is too long dealt with.

    `now` as for `encode`.
    """
    encoded = encode(problems, policy, config, noun, now)
    texts = [
        p.prompt if isinstance(p.prompt, str) else policy.tokenizer.decode(ids)
        for p, ids in zip(encoded.problems, encoded.prompt_ids)
    ]
    return evaluation.Questions(encoded.problems, encoded.prompt_ids, texts)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How an update is cut to a device's memory, where the config leaves that to the memory."""

    remat: str = "dots"
    tokens: int = 0  # of a row of a microbatch; 0: the usual number


USUAL = Fit()


def build(
    config: ConfigDict,
    folder: Path,
    model_path: str,
    fit: Callable[[ConfigDict, ModelConfig, Mesh, int, Path], Fit],
) -> Run:
    """Everything read, checked and set up; the policy's weights are not.

    `fit` is asked how the update of prompts of at most so many tokens is cut.
    """
    mesh = sharding.make_mesh(**config.mesh)
    rules.check_devices(config, sharding.num_row_shards(mesh))
    _check_host_memory(config, mesh)
    rewards = load_rewards(config)
    evaluation.refuse_samples(rewards, config.evaluation.num_samples, "evaluation.num_samples")
    policy = policy_lib.read(model_path, kept=folder / "source")
    rules.check_heads(policy.model.num_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    policy.check_length(config.data.max_prompt_tokens, config.rollout.max_tokens)
    train, held_out = (answerable(config, rewards, part) for part in load_problems(config))
    tell_of(config, train, held_out)
    workdir.open_for(config, folder)
    now = inputs.date(config.data.date, folder)
    train = questions(train, policy, config, "training problems", now)
    read = inputs.of_run(train.problems, train.prompt_ids, held_out, policy, rewards)
    inputs.hold(folder, read)
    policy = policy_lib.keep(policy, folder / "source")
    held_out = held_out[: config.evaluation.num_problems]
    if held_out:
        held_out = questions(held_out, policy, config, "held-out problems", now)
    longest = max(map(len, train.prompt_ids))
    learner = make_learner(
        config, policy.model, mesh, fit(config, policy.model, mesh, longest, folder)
    )
    engine = make_engine(config, policy.model, policy.stop_ids, mesh)
    return Run(
        config=config,
        folder=folder,
        mesh=mesh,
        policy=policy,
        train=train,
        held_out=held_out or None,
        engine=engine,
        evaluator=make_evaluator(config, engine),
        optimizer=learner.optimizer,
        schedule=learner.schedule,
        prepare=learner.prepare,
        update=learner.update,
        sizes=learner.sizes,
        ref_params=_reference(config, policy, mesh) if config.algorithm.kl_coef else None,
        checkpoints=Checkpoints(
            config.checkpoint.folder or folder / "checkpoints",
            keep=config.checkpoint.keep,
            max_failed=config.checkpoint.max_failed,
            on_saved=functools.partial(workdir.note_saved, folder),
            due_every=guards.may_roll_back(config)
            * config.checkpoint.every_steps
            * rules.num_updates_per_step(config),
        ),
        read=read,
        rewards=start_rewards(config, rewards),  # last: nothing is refused from here on
    )


def _reference(config: ConfigDict, policy: policy_lib.Policy, mesh: Mesh) -> Params:
    dtype = jnp.dtype(config.model.dtype)
    params = policy_lib.load_params(policy, mesh, config.seed, dtype)
    return sharding.to_host_memory(params) if config.model.offload_reference else params


def _check_host_memory(config: ConfigDict, mesh: Mesh) -> None:
    wanted = {
        "optim.offload": config.optim.offload,
        "model.offload_reference": config.model.offload_reference,
    }
    for option, value in wanted.items():
        if value:
            sharding.check_host_memory(mesh, option)


@dataclasses.dataclass(frozen=True)
class Learner:
    """What turns rollouts into new parameters."""

    scorer: update_lib.Scorer
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    prepare: update_lib.Prepare
    update: Callable

    @property
    def sizes(self) -> dict[str, Sizes]:
        return {"scoring": self.prepare.sizes, "update": self.update.sizes}


def make_scorer(
    config: ConfigDict, model: ModelConfig, mesh: Mesh, sampling: Sampling, fit: Fit = USUAL
) -> update_lib.Scorer:
    """How the config runs a model of this shape over given completions."""
    dtype, layers = jnp.dtype(config.model.dtype), config.model.layers
    in_a_loop = not sharding.is_gpu(mesh) if layers == "auto" else layers == "loop"
    return update_lib.Scorer(
        model,
        mesh,
        sampling,
        dtype,
        remat=fit.remat if config.model.remat == "auto" else config.model.remat,
        scan_layers=in_a_loop,
        kernels=kernels.choose(config.model.attention, model, mesh, dtype),
    )


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """The config's AdamW, in its precision."""
    optimizer = optim.adamw(
        schedule,
        beta1=config.optim.beta1,
        beta2=config.optim.beta2,
        eps=config.optim.eps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        kept=config.optim.moments,
        seed=config.seed,
    )
    return optim.for_params(
        optimizer,
        config.model.param_dtype,
        float32_copy=config.optim.float32_copy,
        seed=config.seed,
    )


def make_learner(config: ConfigDict, model: ModelConfig, mesh: Mesh, fit: Fit = USUAL) -> Learner:
    """The config's update of a model of this shape; nothing is compiled or allocated yet.

    `fit` holds where the config names no microbatch or no way of computing again.
    """
    scorer = dataclasses.replace(
        make_scorer(config, model, mesh, _sampling(config), fit),
        microbatch=max(config.batch.microbatch, 0),
        tokens=fit.tokens if config.batch.microbatch == -1 else 0,
    )
    algorithm, updates = config.algorithm, rules.num_updates_per_step(config)
    schedule = optim.schedule(
        config.optim.learning_rate,
        warmup_steps=config.optim.warmup_steps,
        kind=config.optim.schedule,
        num_updates=config.loop.num_steps * updates,
        end_fraction=config.optim.end_fraction,
    )
    optimizer = make_optimizer(config, schedule, config.optim.weight_decay, config.optim.clip_norm)
    objective = losses.Objective(
        algorithm.clip_low,
        algorithm.clip_high,
        algorithm.kl_coef,
        algorithm.entropy_coef,
        algorithm.normalizer,
        config.rollout.max_tokens,
        algorithm.importance_correction,
        algorithm.importance_cap,
        algorithm.kl_gradient,
    )
    return Learner(
        scorer=scorer,
        optimizer=optimizer,
        schedule=schedule,
        prepare=update_lib.make_prepare(
            scorer,
            scale_by=algorithm.scale_by,
            mask_truncated=algorithm.mask_truncated,
            with_old=rules.needs_old_pass(config),
            num_minibatches=config.batch.minibatches,
        ),
        update=update_lib.make_update(
            scorer,
            objective,
            optimizer,
            num_minibatches=config.batch.minibatches,
            offload=config.optim.offload,
            bounds=guards.refusing_bounds(config),
        ),
    )


def make_engine(
    config: ConfigDict,
    model: ModelConfig,
    stop_ids: tuple[int, ...],
    mesh: Mesh,
    *,
    exact: bool = False,
) -> Engine:
    """The config's sampler of a model of this shape; nothing is compiled or allocated yet.

    `exact`: without the 8 bits of weights or cache that the config may ask for.
    """
    rollout = config.rollout
    decoder = decode.decoder_for(
        model,
        mesh,
        _sampling(config),
        stop_ids,
        rollout.max_tokens,
        jnp.dtype(config.model.dtype),
        weights="same" if exact else rollout.weights,
        cache="same" if exact else rollout.cache,
        attention=rollout.attention,
    )
    return Engine(
        decoder,
        num_slots=rollout.num_slots or config.batch.prompts * config.batch.group,
        compact=rollout.compact,
        # An evaluation, with one lane a slot, reads no more prompts at once than a rollout does.
        num_read=config.batch.prompts,
    )


def make_evaluator(config: ConfigDict, engine: Engine) -> Engine:
    """The sampler by which the policy is judged: the config's own where that is exact."""
    decoder = engine.decoder
    exact = make_engine(config, decoder.model, decoder.stop_ids, decoder.mesh, exact=True)
    return engine if exact.decoder == decoder else exact


def _sampling(config: ConfigDict) -> Sampling:
    return Sampling(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p)
