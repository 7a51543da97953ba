"""What there is to name in `rewards.names`: built-in functions, forms of ensembles, prefixes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from grpo_jax.rewards import ensembles, extras, kinds, registry


class Entry(NamedTuple):
    """One reward that can be named."""

    call: str  # how it is written, with its arguments and their defaults
    reads: str  # columns of the data, and what else it needs
    gives: str  # the first paragraph of its documentation


def built_in() -> list[Entry]:
    """The built-in functions, in the order of the table; imports their modules."""
    return [_entry(name, registry.function(name)) for name in registry.BUILT_IN]


def forms() -> list[Entry]:
    """The forms of ensembles."""
    found = []
    for name, form in ensembles.FORMS.items():
        arguments = inspect.signature(form).parameters.values()
        call = f"ensemble:{name}({', '.join(map(_argument, arguments))})"
        found.append(Entry(call, "other rewards", _paragraph(form)))
    return found


def prefixes() -> list[Entry]:
    """What else stands before a colon."""
    others = {p: kind for p, kind in kinds.KINDS.items() if kind.runs != kinds.OTHERS}
    return [Entry(f"{p}...", kind.runs, f"the {kind.after}") for p, kind in others.items()]


def _entry(name: str, found: Callable) -> Entry:
    own = getattr(found, "options", ())
    parameters = [
        p
        for p in inspect.signature(found).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name not in registry.GIVEN
    ]
    arguments = ", ".join(_argument(p) for p in parameters if p.name in own)
    columns = [p for p in parameters if p.name not in own]
    reads = [p.name if p.default is p.empty else f"{p.name}?" for p in columns]
    if lacks := extras.of_function(found):
        reads.append(lacks.partition(",")[0])
    return Entry(f"{name}({arguments})" if arguments else name, ", ".join(reads), _paragraph(found))


def _argument(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return f"{parameter.name}=..."
    default = parameter.default
    return f"{parameter.name}={list(default) if isinstance(default, tuple) else default!r}"


def _paragraph(found: Callable) -> str:
    return " ".join((inspect.getdoc(found) or "").split("\n\n")[0].split())
