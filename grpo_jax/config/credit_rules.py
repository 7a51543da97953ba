"""The rules of options by which turns or steps have advantages of their own."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.messages.values import shown


def check(config: ConfigDict) -> None:
    """Raises ValueError for options that contradict advantages of turns or of steps."""
    refusals: list[tuple[bool, str]] = []
    if config.environment.turn_rewards:
        refusals += _of_turns(config)
    if config.rewards.by_step:
        refusals += _of_steps(config)
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(message)


def _of_both(config: ConfigDict, given: str, what: str) -> tuple[tuple[bool, str], ...]:
    algorithm = config.algorithm
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
            f"{given}: the advantage of a {what} is relative to the group's mean, over its "
            f'deviation or as it is, and not as {stated} say. Set baseline = "mean", scale_by = '
            '"std" or "none", credit = "reward", aggregate = "sum", whiten = "none", kl_in = '
            '"loss" and critic = False.',
        ),
        (
            config.prompts.drop_equal_groups,
            f"{given} with prompts.drop_equal_groups = True: a group of equal rewards may differ "
            f"by {what}s. Leave one of them out.",
        ),
    )


def _of_turns(config: ConfigDict) -> tuple[tuple[bool, str], ...]:
    given = "environment.turn_rewards = True"
    return (
        *_of_both(config, given, "turn"),
        (
            "environment:turn_rewards" not in config.rewards.names,
            f'{given}, and rewards.names has no "environment:turn_rewards", the sum of what an '
            "environment sets as `turn_reward` after each turn. Name it there, with its weight.",
        ),
    )


def _of_steps(config: ConfigDict) -> tuple[tuple[bool, str], ...]:
    given = f"rewards.by_step = {shown(config.rewards.by_step)}"
    return (
        (
            derived.has_environment(config),
            f"{given} is of completions of one turn, and environment.classes or environment.tools "
            "makes them conversations. Set environment.turn_rewards = True for rewards of turns, "
            "and rewards.by_step = ().",
        ),
        *_of_both(config, given, "step"),
        (
            bool(config.hybrid.method),
            f"{given} with hybrid.method = {shown(config.hybrid.method)}: a hybrid weighs "
            'completions as a whole. Set rewards.by_step = (), or hybrid.method = "".',
        ),
    )
