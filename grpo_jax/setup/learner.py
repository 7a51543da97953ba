"""Builds the learner, which turns rollouts into new parameters, from a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.algorithm import components
from grpo_jax.algorithm.adaptive import AdaptiveEntropy, AdaptiveKL, Controller, Mix
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import LossComponent
from grpo_jax.algorithm.distillation import DivergenceLoss, RewardedByTeacher
from grpo_jax.algorithm.hybrid_loss import HybridLoss
from grpo_jax.algorithm.hybrid_methods import Schedule
from grpo_jax.algorithm.hybrids import Hybrid, Weigh
from grpo_jax.algorithm.objective import Objective
from grpo_jax.config import derived, guard_rules
from grpo_jax.config.dotted import flatten
from grpo_jax.devices import sharding
from grpo_jax.kernels import choice
from grpo_jax.learner import moving_reference, optim, update
from grpo_jax.learner.actor_critic import ActorCriticUpdate
from grpo_jax.learner.experience import Prepare, make_prepare
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.scoring import Scorer
from grpo_jax.setup import critic as critic_lib
from grpo_jax.setup import engine
from grpo_jax.setup import teacher as teacher_lib
from grpo_jax.structs import Array, ModelConfig, Sampling


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """How an update is fitted to a device's memory, if the config leaves this open."""

    remat: str = "dots"
    tokens: int = 0  # of a microbatch's row; 0: the default


DEFAULT = MemoryPlan()


@dataclasses.dataclass(frozen=True)
class Learner:
    """The programs that turn rollouts into new parameters."""

    scorer: Scorer
    optimizer: optax.GradientTransformation
    learning_rate: Callable  # program: learning rate by update number
    prepare: Prepare
    update: update.Update | ActorCriticUpdate
    controllers: tuple[Controller, ...] = ()  # of coefficients that are no constants
    refresh_reference: Callable | None = None  # program; None: the reference is fixed

    critic: critic_lib.Critic | None = None  # None: advantages are of completions

    @property
    def sizes(self) -> dict[str, CompiledSizes]:
        if self.critic is None:
            return {"scoring": self.prepare.sizes, "update": self.update.sizes}
        return {
            "scoring": self.prepare.sizes,
            "values": self.critic.values.sizes,
            "update": self.update.policy.sizes,
            "critic's update": self.critic.update.sizes,
        }


def make_scorer(
    config: ConfigDict,
    model: ModelConfig,
    mesh: Mesh,
    sampling: Sampling,
    fit: MemoryPlan = DEFAULT,
) -> Scorer:
    """The config's scorer for a model of this shape."""
    dtype, scan = jnp.dtype(config.model.dtype), config.model.scan_layers
    in_a_loop = not sharding.is_gpu(mesh) if scan == "auto" else scan == "on"
    return Scorer(
        model,
        mesh,
        sampling,
        dtype,
        remat=fit.remat if config.model.remat == "auto" else config.model.remat,
        scan_layers=in_a_loop,
        kernels=choice.choose(
            config.model.attention, model, mesh, dtype, in_parts=derived.forks(config)
        ),
    )


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """The config's AdamW, in the config's precision."""
    optimizer = optim.adamw(
        schedule,
        beta1=config.optim.beta1,
        beta2=config.optim.beta2,
        eps=config.optim.eps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        kept=config.optim.moments_dtype,
        seed=config.seed,
    )
    return optim.for_params(
        optimizer,
        config.model.param_dtype,
        master_weights=config.optim.master_weights,
        seed=config.seed,
    )


def _learning_rate(schedule: optax.Schedule) -> Callable:
    @jax.jit
    def learning_rate(update: Array) -> Array:
        return schedule(update)

    return learning_rate


def advantage_options(config: ConfigDict) -> AdvantageOptions:
    """The config's advantage."""
    algorithm = config.algorithm
    return AdvantageOptions(
        baseline=algorithm.baseline,
        scale_by=algorithm.scale_by,
        aggregate=algorithm.aggregate,
        credit=algorithm.credit,
        whiten=algorithm.whiten,
        kl_in=algorithm.kl_in,
        kl_coef=algorithm.kl_coef,
        weights=tuple(config.rewards.weights),
    )


def hybrid_of(config: ConfigDict) -> Hybrid | None:
    """The config's hybrid; None if it has none."""
    method, options = derived.hybrid_method(config), config.hybrid
    if method is None:
        return None
    mix = hint = None
    if method.mixes:
        warmup, decay = options.mix_warmup_steps, options.mix_decay_steps
        mix = Schedule(options.mix_peak, options.mix_valley, warmup, decay)
    if method.given == "prefix":  # the paper's counts its steps from 1, and ends with 0
        hint = Schedule(
            options.hint_high, options.hint_low, 0, options.hint_steps, at_end=0.0, offset=1
        )
    return Hybrid(
        method,
        method.nll_coef if options.nll_coef == -1 else options.nll_coef,
        options.shaping,
        options.pass_reward,
        options.max_pass_rate,
        mix,
        hint,
    )


def _component(config: ConfigDict, objective: Objective, hybrid: Hybrid | None) -> LossComponent:
    """The loss of the objective, with that of a hybrid or of a teacher if there is one."""
    policy, distill = components.PolicyLoss(objective), config.distill
    if hybrid is not None:
        return HybridLoss(policy, hybrid)
    if not distill.teacher:
        return policy
    if distill.loss == "reward":
        return RewardedByTeacher(objective)
    return DivergenceLoss(policy, distill.coef, distill.beta)


def make_learner(
    config: ConfigDict,
    model: ModelConfig,
    mesh: Mesh,
    fit: MemoryPlan = DEFAULT,
    critic: ModelConfig | None = None,
    teacher: ModelConfig | None = None,
) -> Learner:
    """The config's learner for a model of this shape; nothing is compiled or allocated yet.

    `fit` is used if the config sets no microbatch or no `remat`. `critic`, `teacher`: the shapes of
    the config's critic and teacher, if it has them.
    """
    scorer, critic = _scorer(config, model, mesh, fit), _critic(config, critic, mesh, fit)
    algorithm = config.algorithm
    updates = derived.num_updates_per_step(config)
    schedule = optim.schedule(
        config.optim.learning_rate,
        warmup_steps=config.optim.warmup_steps,
        kind=config.optim.schedule,
        num_updates=config.loop.num_steps * updates,
        end_fraction=config.optim.end_fraction,
    )
    optimizer = make_optimizer(
        config, schedule, config.optim.weight_decay, config.optim.max_grad_norm
    )
    objective = Objective.of({n.removeprefix("algorithm."): v for n, v in flatten(config).items()})
    if derived.has_kl_in_reward(config):
        objective = dataclasses.replace(objective, kl_coef=0.0)
    hybrid = hybrid_of(config)
    of_teacher = None if teacher is None else teacher_lib.scorer_of(scorer, teacher)
    is_reward = config.distill.loss == "reward"
    of_policy = update.make_update(
        scorer,
        _component(config, objective, hybrid),
        optimizer,
        num_minibatches=config.batch.minibatches,
        offload=config.optim.offload,
        bounds=guard_rules.refusing_bounds(config),
        of_teacher=None if is_reward else of_teacher,
    )
    return Learner(
        scorer=scorer,
        optimizer=optimizer,
        learning_rate=_learning_rate(schedule),
        prepare=make_prepare(
            scorer,
            advantage_options(config),
            mask_truncated=algorithm.mask_truncated,
            with_old=derived.needs_old_pass(config),
            num_minibatches=config.batch.minibatches,
            top_entropy_share=algorithm.top_entropy_share,
            weigh=None if hybrid is None else Weigh(hybrid, objective, config.batch.minibatches),
            of_teacher=of_teacher if is_reward else None,
            teacher_coef=config.distill.coef,
            **({} if critic is None else {"values": critic.values, "gae": critic.gae}),
        ),
        update=of_policy if critic is None else ActorCriticUpdate(of_policy, critic.update),
        controllers=_controllers(config),
        refresh_reference=(
            moving_reference.make_refresh(model, mesh, algorithm.reference_mix)
            if algorithm.reference_refresh_steps
            else None
        ),
        critic=critic,
    )


def _scorer(config: ConfigDict, model: ModelConfig, mesh: Mesh, fit: MemoryPlan) -> Scorer:
    """The scorer of rollouts."""
    return dataclasses.replace(
        make_scorer(config, model, mesh, engine.sampling(config), fit),
        microbatch=max(config.batch.microbatch, 0),
        tokens=fit.tokens if config.batch.microbatch == -1 else 0,
    )


def _critic(
    config: ConfigDict, model: ModelConfig | None, mesh: Mesh, fit: MemoryPlan
) -> critic_lib.Critic | None:
    if model is None:
        return None
    asked = config.critic
    schedule = critic_lib.schedule(config)
    optimizer = make_optimizer(config, schedule, asked.weight_decay, asked.max_grad_norm)
    return critic_lib.make(config, _scorer(config, model, mesh, fit), optimizer)


def _controllers(config: ConfigDict) -> tuple[Controller, ...]:
    """The controllers of the coefficients that follow a target or a schedule."""
    algorithm, found = config.algorithm, []
    hybrid = hybrid_of(config)
    if hybrid is not None and hybrid.mix is not None:
        found.append(Mix(hybrid.mix))
    if algorithm.kl_target:
        found.append(
            AdaptiveKL(
                algorithm.kl_coef,
                algorithm.kl_target,
                algorithm.kl_horizon,
                config.batch.prompts * config.batch.group,
            )
        )
    if algorithm.entropy_target:
        found.append(
            AdaptiveEntropy(
                algorithm.entropy_coef,
                algorithm.entropy_target,
                algorithm.entropy_coef_delta,
                algorithm.entropy_coef_min,
                algorithm.entropy_coef_max,
            )
        )
    return tuple(found)


def make_supervised_learner(
    config: ConfigDict,
    model: ModelConfig,
    mesh: Mesh,
    num_updates: int,
    component: LossComponent | None = None,
    section: str = "sft",
    group: int = 1,
) -> Learner:
    """The config's learner of given completions, for a model of this shape.

    Nothing is compiled yet. The learning rate is 0 after `num_updates`. `component`: None for that
    of supervised training. `section`: where the config has the schedule. `group`: completions of a
    row of data. The signal of a step passes through as it is: `Prepare` takes it as rewards, and
    gives it as advantages.
    """
    schedule = config[section]
    rate = optim.schedule(
        schedule.learning_rate,
        warmup_steps=schedule.warmup_steps,
        kind=schedule.schedule,
        num_updates=num_updates,
        end_fraction=0.0,
    )
    optimizer = make_optimizer(config, rate, schedule.weight_decay, clip_norm=1.0)
    limit = config.data.max_prompt_tokens + group * schedule.max_tokens
    at_once = -(-schedule.microbatch * limit // sharding.num_row_shards(mesh))
    scorer = make_scorer(config, model, mesh, Sampling())
    scorer = dataclasses.replace(scorer, tokens=at_once, whole=group > 1)
    as_given = AdvantageOptions(baseline="none", scale_by="none")
    return Learner(
        scorer=scorer,
        optimizer=optimizer,
        learning_rate=_learning_rate(rate),
        prepare=make_prepare(scorer, as_given, mask_truncated=False, with_old=False),
        update=update.make_update(
            scorer,
            component or components.NLLLoss(config.sft.loss, config.logging.token_metrics),
            optimizer,
            num_minibatches=1,
            offload=config.optim.offload,
        ),
    )
