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
    old = _value(config, name)
    value = text if isinstance(old, str) else _parsed(text)
    if isinstance(old, tuple) and isinstance(value, str):
        value = _split(value)
    _set(config, name, _typed(name, value, old, text))


def assign(config: ConfigDict, name: str, value: Any) -> None:
    """The same with a value of Python in place of a text."""
    if hasattr(value, "item") and not getattr(value, "shape", ()):  # a number of NumPy
        value = value.item()
    _set(config, name, _typed(name, value, _value(config, name), value))


def _value(config: ConfigDict, name: str) -> Any:
    flat = flatten(config)
    if name not in flat:
        raise ValueError(other_names.no_such(name))
    return flat[name]


def _set(config: ConfigDict, name: str, value: Any) -> None:
    section, _, leaf = name.rpartition(".")
    holder = config[section] if section else config
    holder[leaf] = value


def _parsed(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    # Of nonsense, of nesting without end, of a dict with a list as a key.
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return text


def _split(text: str) -> list[str]:
    """A text at its commas, but for those within brackets and quotes: `a(x=1,y=2),b`."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()] or [text]


def _typed(name: str, value: Any, old: Any, text: Any) -> Any:
    """`value`, which stands there as `text`, as one of the type of `old`."""
    kind = type(old)
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:  # 10**400
            pass
    if kind is tuple and isinstance(value, (list, str, int, float)):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
        raise ValueError(
            f"{name} = {shown(text)} is not {wanted.get(kind, 'a tuple')}. "
            f"It is {old!r} now; give a value of that type."
        )
    return value
