"""The rules that the options of a critic follow together with others."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import options
from grpo_jax.messages.values import shown

_OWN = ("discount", "gae_lambda", "gae_length_scale")


def check(config: ConfigDict) -> None:
    """Raises ValueError for options that contradict a critic, or that only a critic reads."""
    if not config.algorithm.critic:
        _refuse_unread(config)
        return
    algorithm = config.algorithm
    needed = {  # what each other value would take from the rewards of completions
        "baseline": ("none", "the critic's values are the baseline"),
        "scale_by": ("none", "advantages of tokens are not divided by a group's deviation"),
        "credit": ("reward", "the critic learns the reward itself"),
        "aggregate": ("sum", "there is one critic, of the sum of the rewards"),
    }
    for name, (value, why) in needed.items():
        if algorithm[name] != value:
            raise ValueError(
                f"algorithm.critic = True and algorithm.{name} = {shown(algorithm[name])}: {why}. "
                f'Set algorithm.{name} = {shown(value)}, or algorithm.preset = "ppo", or '
                "algorithm.critic = False."
            )
    if algorithm.whiten == "completions":
        raise ValueError(
            'algorithm.critic = True and algorithm.whiten = "completions": the advantages are of '
            'tokens. Set it to "tokens" or "none".'
        )
    if algorithm.gae_length_scale and not _is_default(config, "algorithm.gae_lambda"):
        raise ValueError(
            f"algorithm.gae_lambda = {algorithm.gae_lambda:g} and algorithm.gae_length_scale = "
            f"{algorithm.gae_length_scale:g} both say lambda. Leave one of them."
        )
    if config.critic.first_steps:
        for name in ("kl_target", "entropy_target"):
            if algorithm[name]:
                raise ValueError(
                    f"critic.first_steps = {config.critic.first_steps} leaves the policy out of "
                    f"the first steps, and algorithm.{name} = {algorithm[name]:g} follows a metric "
                    "of its updates. Set one of them to 0."
                )


def _refuse_unread(config: ConfigDict) -> None:
    names = [f"critic.{name}" for name in config.critic] + [f"algorithm.{n}" for n in _OWN]
    for name in names:
        if not _is_default(config, name):
            section, _, leaf = name.partition(".")
            raise ValueError(
                f"{name} = {shown(config[section][leaf])} is of a critic, and algorithm.critic = "
                'False has none. Set algorithm.preset = "ppo", or leave it at '
                f"{shown(options.BY_NAME[name].default)}."
            )


def _is_default(config: ConfigDict, name: str) -> bool:
    section, _, leaf = name.partition(".")
    return config[section][leaf] == options.BY_NAME[name].default
