"""What the options say of guards: their bounds, and what each does."""

from __future__ import annotations

import math

from ml_collections import ConfigDict


def bounds(config: ConfigDict) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of an update's metrics that are not out of bounds."""
    options = config.guards
    return {
        "policy/kl": (-math.inf, options.kl_max or math.inf),
        "policy/entropy": (options.entropy_min or -math.inf, options.entropy_max or math.inf),
    }


def refusing_bounds(config: ConfigDict) -> dict[str, tuple[float, float]]:
    """Those out of which the update itself refuses what it computed."""
    actions = actions_of(config)
    return {n: b for n, b in bounds(config).items() if actions[guard(n)] == "skip"}


def may_roll_back(config: ConfigDict) -> bool:
    """Whether a guard may ask for the last checkpoint."""
    return "roll_back" in (*actions_of(config).values(), config.guards.after_skips)


def actions_of(config: ConfigDict) -> dict[str, str]:
    """What each guard does, by its name."""
    options = config.guards
    return {
        "nonfinite": options.nonfinite,
        "failed_rewards": options.failed_rewards,
        "reward": options.reward,
        "equal_groups": options.equal_groups,
        "members": options.members,
        "kl": options.kl,
        "entropy": options.entropy,
    }


def guard(metric: str) -> str:
    return metric.removeprefix("policy/")
