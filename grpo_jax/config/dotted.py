"""Options by their dotted names: all of a config, and one of them set from a text."""

from __future__ import annotations

import ast
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.config import other_names
from grpo_jax.messages.values import shown


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets an option; ValueError where there is none, or its type is another."""
    flat = flatten(config)
    if name not in flat:
        raise ValueError(other_names.no_such(name))
    section, _, leaf = name.rpartition(".")
    holder = config[section] if section else config
    holder[leaf] = _parse(name, text, flat[name])


def _parse(name: str, text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`."""
    kind = type(old)
    if kind is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        if kind is float and type(value) is int:
            value = float(value)
    # Of nonsense, of nesting without end, of a dict with a list as a key, of 10**400 as a float.
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, OverflowError):
        value = text
    if kind is tuple and isinstance(value, (list, str, int, float)):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "True or False"}
        raise ValueError(
            f"{name} = {shown(text)} is not {wanted.get(kind, 'a tuple')}. "
            f"It is {old!r} now; give a value of that type."
        )
    return value
