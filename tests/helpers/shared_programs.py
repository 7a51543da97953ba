"""Lets tiny runs share their programs, since tracing and compiling take most of their time.

Runs with the same options and model have the same programs, so the second uses those of the first.
Each begins with its own row sizes, as a new process does. The picture of a run takes a sixth of the
remaining time, so only tests that look at it draw it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.config.dotted import flatten
from grpo_jax.metrics import curves
from grpo_jax.trainers import given, grpo_run

_MADE: dict[tuple, Any] = {}
# Options that no program reads; and options that sampling does not read.
_BESIDE = ("checkpoint", "logging", "rewards")
_LEARNING = ("optim", "sft", "loop", "guards", "evaluation")


def share(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Lets the runs of this process share their programs."""
    engine = _kept(grpo_run.make_engine, *_BESIDE, *_LEARNING)
    for trainer in (grpo_run, given):
        setattr(trainer, "make_engine", engine)
    setattr(grpo_run, "make_learner", _kept(grpo_run.make_learner, *_BESIDE))
    supervised = _kept(given.make_supervised_learner, *_BESIDE)
    setattr(given, "make_supervised_learner", supervised)
    setattr(curves, "curves", lambda folder: Path(folder) / "curves.png")


def _kept(make: Callable, *beside: str) -> Callable:
    """`make(config, ...)`, called once for configs that differ only in these sections."""

    def call(config, *args, **kwargs):
        flat = flatten(config).items()
        read = {k: v for k, v in flat if k.split(".")[0] not in beside or k == "rewards.weights"}
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
