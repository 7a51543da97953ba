"""The rules that the options of environments follow together, and with others."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.config.environment_options import ENVIRONMENT
from grpo_jax.messages.values import shown


def check(config: ConfigDict) -> None:
    """Raises ValueError for options of environments that contradict others."""
    if not derived.has_environment(config):
        for option in ENVIRONMENT:
            value = config.environment[option.name.rpartition(".")[2]]
            if value != option.default:
                raise ValueError(
                    f"{option.name} = {shown(value)} is of an environment, and neither "
                    "environment.classes nor environment.tools names one. Set one of them, or "
                    f"leave {option.name} at {shown(option.default)}."
                )
        return
    named = "environment.classes" if config.environment.classes else "environment.tools"
    refusals = (
        (
            config.loop.async_rollouts,
            f"loop.async_rollouts = True with {named}: the environments of a step ahead are in no "
            "checkpoint. Set loop.async_rollouts = False.",
        ),
        (
            bool(config.hybrid.method),
            f"hybrid.method = {shown(config.hybrid.method)} with {named}: a demonstration has no "
            'environment that answers it. Set hybrid.method = "".',
        ),
        (
            config.environment.turn_tokens > config.rollout.max_tokens,
            f"environment.turn_tokens = {config.environment.turn_tokens} is more than a whole "
            f"episode may have, rollout.max_tokens = {config.rollout.max_tokens}. Lower the one, "
            "or raise the other.",
        ),
    )
    if config.environment.turn_rewards:
        refusals += _of_turn_rewards(config)
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(message)


def _of_turn_rewards(config: ConfigDict) -> tuple[tuple[bool, str], ...]:
    algorithm, given = config.algorithm, "environment.turn_rewards = True"
    stated = ", ".join(
        f"algorithm.{name} = {shown(algorithm[name])}"
        for name in ("baseline", "scale_by", "credit", "aggregate", "whiten", "kl_in")
    )
    plain = (
        algorithm.baseline == "mean"
        and algorithm.scale_by in ("std", "none")
        and (algorithm.credit, algorithm.aggregate) == ("reward", "sum")
        and (algorithm.whiten, algorithm.kl_in) == ("none", "loss")
    )
    return (
        (
            not plain or algorithm.critic,
            f"{given}: the advantage of a turn is its reward to go minus the group's mean, over "
            f'its deviation or as it is, and not as {stated} say. Set baseline = "mean", scale_by '
            '= "std" or "none", credit = "reward", aggregate = "sum", whiten = "none", kl_in = '
            '"loss" and critic = False.',
        ),
        (
            "environment:turn_rewards" not in config.rewards.names,
            f'{given}, and rewards.names has no "environment:turn_rewards", the sum of what an '
            "environment sets as `turn_reward` after each turn. Name it there, with its weight.",
        ),
        (
            config.prompts.drop_equal_groups,
            f"{given} with prompts.drop_equal_groups = True: a group of equal rewards may differ "
            "by turns. Set one of them to False.",
        ),
    )
