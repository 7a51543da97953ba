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
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(message)
