"""Lets tiny runs share their programs, since tracing and compiling take most of their time.

Runs whose samplers and learners have the same settings have the same programs, so the second uses
those of the first. Where only a part of a learner is the same, such as all but its optimizer, they
share the programs of that part. Each begins with its own row sizes, as a new process does. The
picture of a run takes a sixth of the remaining time, so only tests that look at it draw it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import made_once

from grpo_jax.config.dotted import flatten
from grpo_jax.devices.compiling import Call
from grpo_jax.learner import update
from grpo_jax.metrics import curves
from grpo_jax.models import policy
from grpo_jax.setup import engine as engine_lib
from grpo_jax.setup import learner as learner_lib
from grpo_jax.trainers import given, grpo_run

_MADE: dict[tuple, Any] = {}
_ENGINES: list[tuple[tuple, Any]] = []
_checks_nans = False
# Options that no learner reads; of a model it is given the shape, of the data nothing.
_BESIDE = {
    *("checkpoint", "data", "evaluation", "hosts", "logging", "profile", "prompts", "rewards"),
    *("compile_cache", "critic.path", "lora.path", "model.path"),
}
_READ = ("data.max_prompt_tokens", "rewards.weights")  # but these


def share(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Lets the runs of this process share their programs."""
    engine = _equal(grpo_run.make_engine)
    for module in (grpo_run, given, engine_lib):  # which makes those of evaluations
        setattr(module, "make_engine", engine)
    setattr(grpo_run, "make_learner", _kept(grpo_run.make_learner))
    setattr(given, "make_supervised_learner", _kept(given.make_supervised_learner, "loop"))
    setattr(update, "make_update", _with_gradient(update.make_update))
    setattr(learner_lib, "make_prepare", _with_scores(learner_lib.make_prepare))
    setattr(policy, "counting_nonfinite", _counting(policy.counting_nonfinite))
    setattr(curves, "curves", lambda folder, **how: Path(folder) / "curves.png")


def _equal(make: Callable) -> Callable:
    """`make(config, ...)`, or the engine that it has made with the same settings."""

    def call(config, *args, **kwargs):
        made = make(config, *args, **kwargs)
        settings = (made.decoder, made.num_slots, made.compact, made.num_read, config.debug.nans)
        for others, engine in _ENGINES:
            if others == settings:
                return engine
            if (others[0], others[-1]) == (settings[0], settings[-1]):  # with other slots
                for name in made_once.PROGRAMS:
                    setattr(made, name, getattr(engine, name))
        _ENGINES.append((settings, made))
        return made

    return call


def _kept(make: Callable, *beside: str) -> Callable:
    """`make(config, ...)`, called once for configs that differ only in what is not read."""

    def call(config, *args, **kwargs):
        unread = {*_BESIDE, *beside}
        if config.optim.schedule == "constant":  # else the rate follows from the number of updates
            unread.add("loop")
        read = {
            name: value
            for name, value in flatten(config).items()
            if name in _READ or not unread & {name, name.split(".")[0]}
        }
        # A policy has a tokenizer, which no program reads.
        with_model = (getattr(x, "model", x) for x in args)
        key = (make.__name__, json.dumps(read, default=str), *with_model, *sorted(kwargs.items()))
        if key not in _MADE:
            global _checks_nans  # whose programs are called in another way
            _checks_nans = config.debug.nans
            _MADE[key] = make(config, *args, **kwargs)
        made = _MADE[key]
        for sizes in getattr(made, "sizes", {}).values():
            sizes.restore(None)
        return made

    return call


def _first(made: Any, names: tuple[str, ...], *key: Hashable) -> Any:
    """`made` with those programs of the first one that was made with this key."""
    first = _MADE.setdefault((*names, _checks_nans, *key), made)
    return dataclasses.replace(made, **{name: getattr(first, name) for name in names})


def _with_gradient(make: Callable) -> Callable:
    """`make_update(scorer, component, ...)`; its gradient knows no optimizer."""

    def call(scorer, component, *args, of_teacher=None, **kwargs):
        made = make(scorer, component, *args, of_teacher=of_teacher, **kwargs)
        return _first(made, ("zero_gradient", "gradient"), scorer, component, of_teacher)

    return call


def _with_scores(make: Callable) -> Callable:
    """`make_prepare(scorer, ...)`; its scores know no advantages."""

    def call(scorer, options, **kwargs):
        made = make(scorer, options, **kwargs)
        made = _first(made, ("score",), made.scorer, made.selects)
        read = ("gae", "mask_truncated", "weigh")
        return _first(made, ("advantages",), options, *(kwargs.get(name) for name in read))

    return call


def _counting(make: Callable) -> Callable:
    """`counting_nonfinite(tree, mesh)`, whose program is made once for all arrays of a mesh."""

    def call(tree, mesh):
        made = make(tree, mesh)
        return Call(_MADE.setdefault(("counting", mesh), made.program), made.args)

    return call
