"""Engines, `Prepare` and `Update` of a test, which have the programs of an equal one made before.

Tracing and lowering a program takes as long as compiling it here. A test that replaces a part of
the package which a program has traced makes its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from grpo_jax.learner import experience, update
from grpo_jax.learner.experience import Prepare
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.update import Update
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.engine import Engine

_KEPT = 8  # of each kind: their executables take memory
PROGRAMS = (  # of an engine
    *("empty", "admit", "decode", "decode_kept", "compact_slots", "put_back", "align", "append"),
    "publish",
)
_engines: dict[Decoder, dict[str, Callable]] = {}
_others: dict[str, dict[Hashable, Any]] = {"prepare": {}, "update": {}, "gradient": {}}


def _once(made: dict, key: Hashable, make: Callable[[], Any]) -> Any:
    made[key] = made.pop(key) if key in made else make()  # the last used comes last
    while len(made) > _KEPT:
        made.pop(next(iter(made)))
    return made[key]


def engine(decoder: Decoder, **how) -> Engine:
    """An engine of its own, whatever its slots, with the programs of this decoder."""
    own = Engine(decoder, **how)
    programs = _once(_engines, decoder, lambda: {name: getattr(own, name) for name in PROGRAMS})
    for name, program in programs.items():
        setattr(own, name, program)
    return own


def prepare(scorer, options, **how) -> Prepare:
    """A `Prepare` that begins with its own row sizes, as `make_prepare` makes it."""
    key = scorer, options, tuple(sorted(how.items()))
    make = lambda: experience.make_prepare(scorer, options, **how)  # noqa: E731
    return dataclasses.replace(_once(_others["prepare"], key, make), sizes=CompiledSizes())


def updating(scorer, component, optimizer, **how) -> Update:
    """An `Update` that begins with its own row sizes, as `make_update` makes it.

    Its optimizer's step is that of the very same optimizer: two that are made alike are different
    functions. Its gradient, which knows none, may be that of another.
    """
    key = scorer, component, optimizer, tuple(sorted(how.items()))
    make = lambda: update.make_update(scorer, component, optimizer, **how)  # noqa: E731
    made = _once(_others["update"], key, make)
    of = _once(_others["gradient"], (scorer, component, how.get("of_teacher")), lambda: made)
    return dataclasses.replace(
        made, zero_gradient=of.zero_gradient, gradient=of.gradient, sizes=CompiledSizes()
    )
