"""A config's rewards, and the processes that compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from grpo_jax.hosts import cpus as cpus_lib
from grpo_jax.rewards import ensembles, kinds, registry
from grpo_jax.rewards.none import NoRewards
from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.rewards.registry import Reward
from grpo_jax.setup import reward_models
from grpo_jax.setup.reward_models import RewardModels


def load_rewards(config: ConfigDict) -> list[Reward]:
    """The config's reward functions; ValueError if one is unavailable, or cannot be isolated."""
    options = config.rewards
    rewards = registry.load(
        options.names,
        options.weights,
        options.accuracy,
        start_limit_s=options.start_timeout_s,
        on_failure=options.on_failure,
        by_step=options.by_step,
    )
    for reward in rewards:
        if reward.model:
            reward_models.read(reward.model)
    _check_programs(config, [r for r in rewards if registry.flag(r, "runs_programs")])
    ensembles.refuse(rewards)
    if any(reward.runs == kinds.HOST for reward in rewards):
        _judges().read(config, rewards)
    return rewards


def _judges() -> ModuleType:
    from grpo_jax.setup import judges  # what runs without LLM judges do without

    return judges


def _check_programs(config: ConfigDict, rewards: list[Reward]) -> None:
    """Raises ValueError if rewards that run programs have too little, or cannot be isolated."""
    if not rewards:
        return
    from grpo_jax.rewards import programs  # no other run needs them
    from grpo_jax.rewards.sandbox import isolation

    options = config.rewards
    for reward in rewards:
        found = registry.function(reward.spec)
        seconds, gib = programs.code.needs_of_worker(**getattr(found, "keywords", {}))
        for name, value, least in (
            ("timeout_s", options.timeout_s, seconds),
            ("memory_limit_gib", options.memory_limit_gib or math.inf, gib),
        ):
            if value < least:
                raise ValueError(
                    f"rewards.{name} = {value:g} ends a worker before the limits of "
                    f"{reward.spec!r} end its programs. Set it to at least {least:g}, or lower "
                    "total_s or memory_mib of the reward."
                )
    isolation.check(options.code_isolation)


def start_rewards(
    config: ConfigDict,
    rewards: list[Reward],
    *,
    device_is_busy: bool = True,
    models: RewardModels | None = None,
    folder: Path | None = None,
) -> Pool | NoRewards:
    """The rewards' worker processes: on half of the CPUs, or on all if no device computes.

    `models`: the reward models among the rewards, from `reward_models.load_all`. `folder`: where
    the verdicts of LLM judges are kept, a run's; None: nowhere.
    """
    if not rewards:
        return NoRewards()
    options, cpus = config.rewards, cpus_lib.usable()
    return Pool(
        rewards,
        max_completion_tokens=config.rollout.max_tokens,
        num_workers=options.num_workers or min(max(cpus // (1 + device_is_busy), 1), 16),
        limits=Limits(
            options.timeout_s, int(options.memory_limit_gib * 2**30), options.start_timeout_s
        ),
        models=models,
        host=_judges().start(config, rewards, folder)
        if any(reward.runs == kinds.HOST for reward in rewards)
        else None,
    )


def refuse_samples(rewards: Sequence[Reward], num_samples: int, option: str) -> None:
    """Raises ValueError if samples are asked for and no reward tells which are right."""
    if num_samples and not any(reward.gives_accuracy for reward in rewards):
        names = f" ({', '.join(reward.name for reward in rewards)})" if rewards else ""
        raise ValueError(
            f"{option} = {num_samples} asks for pass@k and maj@k, and none of the rewards{names} "
            "is known to give 1 for right and 0 for wrong. Name the one that does in "
            f"rewards.accuracy, or set {option} to 0."
        )
