"""Turns the arguments of `grpo_jax.train` into a config: objects and options by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import config as config_lib
from grpo_jax.config import loading, options, other_names, rules
from grpo_jax.config.dotted import assign
from grpo_jax.data import given as given_rows
from grpo_jax.rewards import given as given_rewards

Reward = str | Callable
Environments = str | Callable | Mapping[str, str | Callable]  # several by the column `environment`
# Sections that repeat option names of other sections: a bare name means the other section's.
_LAST = (
    "critic",
    "judge",
    "environment",
    "sft",
    "preference",
    "reward_model",
    "evaluation",
    "profile",
    "checkpoint",
)


def make_config(
    base: str | Path | ConfigDict | None,
    model: str | Path | None,
    rewards: Reward | Sequence[Reward | tuple[Reward, float]] | None,
    data: Any,
    eval_data: Any,
    chosen: Mapping[str, Any],
    tools: Sequence[str | Callable] | None = None,
    environments: Environments | None = None,
) -> ConfigDict:
    """The config of a run, checked and frozen.

    `base`: a config file, a config, or None for the defaults; the rest is set on top of it.
    `tools`, `environments`: as for `grpo_jax.train`.
    `chosen`: options by name, as `option_of` takes them, or sections as dicts. Raises ValueError
    for wrong values.
    """
    config = _base(base)
    if model is not None:
        config.model.path = str(model)
    if rewards is not None:
        specs, weights = _rewards(rewards)
        config.rewards.names, config.rewards.weights = specs, weights
    if tools is not None:
        config.environment.tools = tuple(_entry(tool, "tools") for tool in tools)
    if environments is not None:
        config.environment.classes = _classes(environments)
        if rewards is None and base is None:
            config.rewards.names, config.rewards.weights = (), ()  # they have their own
    for option, rows in (("path", data), ("eval_path", eval_data)):
        if rows is None:
            continue
        name = "data" if option == "path" else "eval_data"
        is_path = isinstance(rows, (str, Path))
        config.data[option] = str(rows) if is_path else given_rows.give(name, rows)
        if option == "path":
            config.data.task = ""
    for name, value in _flat(chosen).items():
        assign(config, option_of(name), value)
    loading.settle(config)
    rules.check(config)
    return ConfigDict(config).lock()


def _base(base: str | Path | ConfigDict | None) -> ConfigDict:
    if base is None:
        return config_lib.default()
    if isinstance(base, ConfigDict):
        return ConfigDict(base.to_dict()) if base.is_locked else base.copy_and_resolve_references()
    return loading.read(str(base), [])


def _flat(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name; a section given as a dict becomes dotted names."""
    flat: dict[str, Any] = {}
    for name, value in chosen.items():
        if name in options.SECTIONS and isinstance(value, Mapping):
            flat |= {f"{name}.{leaf}": inner for leaf, inner in value.items()}
        else:
            flat[name] = value
    return flat


def in_section(section: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the whole names of those that are the section's, if it has such."""
    own = lambda name: f"{section}.{name}" if f"{section}.{name}" in options.BY_NAME else name  # noqa: E731
    return {own(name): value for name, value in chosen.items()}


def option_of(name: str) -> str:
    """The dotted name of an option, from itself or from its last part.

    If several sections have the last part, sections of the supervised start, evaluation, profile
    and checkpoints do not count. Raises ValueError if no option remains, or several.
    """
    if name in options.BY_NAME:
        return name
    found = [n for n in options.BY_NAME if n.rpartition(".")[2] == name]
    first = [n for n in found if n.partition(".")[0] not in _LAST]
    if len(first or found) == 1:
        return (first or found)[0]
    if not found:
        raise ValueError(other_names.no_such(name))
    section, _, leaf = found[0].partition(".")
    raise ValueError(
        f"{name} may be {' or '.join(found)}. Name one by its section, as in "
        f"{section}={{{leaf!r}: ...}}."
    )


def _entry(found: str | Callable, of: str) -> str:
    return found if isinstance(found, str) else given_rewards.give(found, of)


def _classes(environments: Environments) -> tuple[str, ...]:
    """The value of `environment.classes`."""
    if not isinstance(environments, Mapping):
        return (_entry(environments, "environments"),)
    named = {name: _entry(found, "environments") for name, found in environments.items()}
    return tuple(f"{name}={entry}" for name, entry in named.items())


def _rewards(
    rewards: Reward | Sequence[Reward | tuple[Reward, float]],
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The values of `rewards.names` and `rewards.weights`."""
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    specs, weights = [], []
    for entry in rewards:
        is_pair = isinstance(entry, tuple)
        if is_pair and len(entry) != 2:
            raise ValueError(
                f"rewards holds a tuple of {len(entry)}. Give a function or a name, or a pair of "
                "one and its weight."
            )
        reward, weight = entry if is_pair else (entry, 1.0)
        specs.append(reward if isinstance(reward, str) else given_rewards.give(reward))
        weights.append(float(weight))
    return tuple(specs), tuple(weights)
