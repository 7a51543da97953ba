"""A valid config, and the reason why another is refused."""

from __future__ import annotations

import pytest

from grpo_jax.config import options, rules


def valid(**changes):
    """A config that passes `check`, with some options (dots as double underscores) changed."""
    config = options.default()
    config.data.task = "arithmetic"
    config.sft.num_steps = 1
    with config.unlocked():
        for name, value in changes.items():
            section, _, leaf = name.rpartition("__")
            (config[section] if section else config)[leaf] = value
    return config


def refusal_of(config) -> str:
    with pytest.raises(ValueError) as info:
        rules.check(config)
    return str(info.value)
