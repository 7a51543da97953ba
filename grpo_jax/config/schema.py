"""What is known of one option: its default, unit, range or choices, meaning, and what binds it.

`options.TABLE` states each option with one of the functions at the end of this file. Checks, the
list of `--help` and docs/options.md all come from there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_jax.messages.values import shown


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers between two bounds; without bounds, every finite number."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = dataclasses.asdict(self).items()
        told = [f"{name.replace('_', ' ')} {bound}" for name, bound in bounds if bound is not None]
        return " and ".join(told)


ANY = Range()
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
COUNT = Range(at_least=1)
FRACTION = Range(at_least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option; its type is that of its default."""

    name: str
    default: Any
    meaning: str
    unit: str = ""  # of a number; of a text or tuple what it names
    within: Range | None = None  # of a number
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)  # and what each does
    # Values that mean something of their own. They are allowed, whatever the range.
    special: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    why: str = ""  # the reason for the range, and what is usual
    free: bool = False  # a resumed run may have another value than it was started with

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]

    def refusal(self, value: Any) -> str | None:
        """Why the option cannot have this value of its type, as a message; None where it can."""
        if self.choices and value not in self.choices:
            allowed = ", ".join(self.choices)
            return f"{self.name} = {shown(value)} must be one of {allowed}."
        if self.within is None or (type(value) is not bool and value in self.special):
            return None
        if value not in self.within:
            others = [
                f"{written(v)} ({what})" for v, what in self.special.items() if v not in self.within
            ]
            reason = f": {self.why}" if self.why else ""
            told = ", or ".join([f"must be {self.within}", *others])
            return f"{self.name} = {shown(value)} {told}{reason}."
        return None

    def explanation(self) -> str:
        """What it means and which values it can have, but for those that `details` explains."""
        parts = [self.meaning]
        if self.choices and not any(self.choices.values()):
            parts.append(" or ".join(map(written, self.choices)))
        elif self.within:
            parts.append(str(self.within).capitalize())
        elif isinstance(self.default, tuple):
            parts.append(f"Tuple of {self.unit}")
        elif self.unit:
            parts.append(self.unit[0].upper() + self.unit[1:])
        return " ".join(f"{part}." for part in parts if part)

    def details(self) -> list[str]:
        """Single values as they are written, each with its meaning."""
        if self.choices and not any(self.choices.values()):
            return []
        single = {**self.choices, **self.special}.items()
        return [f"{written(value)}: {what}" if what else written(value) for value, what in single]


def written(value: Any) -> str:
    """A value as a config file writes it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' * (len(value) == 1)})"
    return repr(value)


# --- One function for each kind of option ---------------------------------------------------------


def number(
    name: str,
    default: float,
    within: Range,
    unit: str,
    meaning: str,
    *,
    special: Mapping[float, str] | None = None,
    why: str = "",
    free: bool = False,
) -> Option:
    return Option(name, default, meaning, unit, within, special=special or {}, why=why, free=free)


def choice(
    name: str,
    default: str,
    choices: Mapping[str, str] | Iterable[str],
    meaning: str,
    *,
    free: bool = False,
) -> Option:
    """One of some words: with what each means, or alone where they need no explanation."""
    explained = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    return Option(name, default, meaning, choices=explained, free=free)


def flag(name: str, default: bool, meaning: str, *, free: bool = False) -> Option:
    return Option(name, default, meaning, free=free)


def text(
    name: str,
    default: str,
    what: str,
    meaning: str,
    *,
    special: Mapping[str, str] | None = None,
    free: bool = False,
) -> Option:
    """Any text; `what` says what it names."""
    return Option(name, default, meaning, what, special=special or {}, free=free)


def several(
    name: str,
    default: tuple,
    what: str,
    meaning: str,
    *,
    special: Mapping[tuple, str] | None = None,
    free: bool = False,
) -> Option:
    """A tuple of texts or numbers; `what` says what they name."""
    return Option(name, default, meaning, what, special=special or {}, free=free)
