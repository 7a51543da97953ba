"""Lets tiny runs share their programs, since tracing and compiling take most of their time.

Runs whose samplers and learners have the same settings have the same programs, so the second uses
those of the first. Each begins with its own row sizes, as a new process does. The picture of a run
takes a sixth of the remaining time, so only tests that look at it draw it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.config.dotted import flatten
from grpo_jax.metrics import curves
from grpo_jax.setup import engine as engine_lib
from grpo_jax.trainers import given, grpo_run

_MADE: dict[tuple, Any] = {}
_ENGINES: list[tuple[tuple, Any]] = []
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
    setattr(curves, "curves", lambda folder, **how: Path(folder) / "curves.png")


def _equal(make: Callable) -> Callable:
    """`make(config, ...)`, or the engine that it has made with the same settings."""

    def call(config, *args, **kwargs):
        made = make(config, *args, **kwargs)
        settings = (made.decoder, made.num_slots, made.compact, made.num_read, config.debug.nans)
        for others, engine in _ENGINES:
            if others == settings:
                return engine
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
            _MADE[key] = make(config, *args, **kwargs)
        made = _MADE[key]
        for sizes in getattr(made, "sizes", {}).values():
            sizes.restore(None)
        return made

    return call
