"""The table of options as text: what `--help` prints, and docs/options.md.

`python -m grpo_jax.config.reference > docs/options.md` writes the page anew.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.config import options
from grpo_jax.config.dotted import flatten
from grpo_jax.config.schema import Option, written
from grpo_jax.messages.values import cut

_FREE = "a resumed run may have another value"


def listing(config: ConfigDict, width: int = 100, sections: Collection[str] = ()) -> str:
    """Every option with its value in force, by section, as `--help` prints them.

    With `sections`, those of these alone.
    """
    values = flatten(config)
    lines = [
        "Options with the values in force. *: not the default, which stands beside it.",
        f"[r]: {_FREE} than it was started with.",
        "In a config file: c.optim.learning_rate = 1e-5",
        "Here:             --config.optim.learning_rate=1e-5",
    ]
    for section, members in _sections():
        if sections and section not in sections:
            continue
        lines += ["", f"{section}: {options.SECTIONS[section]}".removeprefix(": ")]
        for option in members:
            lines += _entry(option, values.get(option.name), width)
    return "\n".join(lines)


def as_file(config: ConfigDict) -> str:
    """A config file that gives these options: those that are not the defaults are set."""
    values = flatten(config)
    lines = ["from grpo_jax import config", "", "", "def get_config():", "    c = config.default()"]
    for option in options.TABLE:
        if values[option.name] != option.default:
            lines.append(f"    c.{option.name} = {values[option.name]!r}")
    return "\n".join([*lines, "    return c"])


def _entry(option: Option, value: Any, width: int) -> Iterator[str]:
    default = value == option.default
    mark, state = (" ", "default") if default else ("*", f"default {written(option.default)}")
    unit = f" {option.unit}" if option.within and option.unit else ""
    free = "  [r]" if option.free else ""
    yield f"{mark} {option.name} = {cut(written(value), width)}{unit}  ({state}){free}"
    yield from _wrapped(option.explanation(), width, "      ")
    for detail in option.details():
        yield from _wrapped(detail, width, "        ")


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def page() -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "Made from [`grpo_jax/config/options.py`](../grpo_jax/config/options.py) by",
        "`python -m grpo_jax.config.reference > docs/options.md`; change the table there.",
        "`python -m grpo_jax.train --config FILE --help` lists the options with the values of that",
        "file.",
        "",
        "Set an option in a config file, `c.optim.learning_rate = 1e-5`, or on the command line,",
        "`--config.optim.learning_rate=1e-5`. A mistake is refused before anything is loaded or",
        "compiled. A resumed run must have the values that it was started with, except of options",
        f"marked ↻: {_FREE}.",
        "",
        " · ".join(f"[{name}](#{name})" for name in options.SECTIONS if name),
    ]
    for section, members in _sections():
        lines += ["", f"## {section or 'The run'}", ""]
        lines += [f"{options.SECTIONS[section]}.", ""]
        lines += ["| option | default | meaning |", "| --- | --- | --- |"]
        lines += [_row(option) for option in members]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    unit = f" {option.unit}" if option.within else ""
    meaning = "<br>".join([option.explanation(), *option.details()])
    name = f"`{option.name}`{' ↻' if option.free else ''}"
    default = f"`{written(option.default)}`{unit}".rstrip()
    return f"| {name} | {default} | {meaning.replace('|', chr(92) + '|')} |"


def _sections() -> Iterator[tuple[str, list[Option]]]:
    for section, members in groupby(options.TABLE, key=lambda option: option.section):
        yield section, list(members)


if __name__ == "__main__":
    print(page(), end="")
