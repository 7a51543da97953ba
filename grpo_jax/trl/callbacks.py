"""Calls a `TrainerCallback` of transformers as a callback of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from grpo_jax.api.training import Step

_CALLED = ("on_step_end", "on_log", "on_evaluate")
_BASE = "TrainerCallback"  # whose methods do nothing


def functions_of(callbacks: Iterable[Any], args: Any, updates: int = 1) -> tuple[Callable, ...]:
    """Callbacks as functions of a `Step`; `updates`: of a step, which TRL counts.

    Functions stay as they are. Raises ValueError for an object that is neither a function nor a
    `TrainerCallback`, and for methods of one that no run calls.
    """
    return tuple(one if _is_function(one) else _called(one, args, updates) for one in callbacks)


def _is_function(callback: Any) -> bool:
    return callable(callback) and not isinstance(callback, type)


def _called(callback: Any, args: Any, updates: int) -> Callable[[Step], None]:
    """A function that calls the methods of a `TrainerCallback` after each step."""
    if isinstance(callback, type):
        raise ValueError(f"callbacks: {callback.__name__} is a class. Give {callback.__name__}().")
    own = {n for kind in type(callback).__mro__ if kind.__name__ != _BASE for n in vars(kind)}
    methods = {name for name in own if name.startswith("on_")}
    if not methods & {*_CALLED}:
        raise ValueError(
            f"callbacks: {type(callback).__name__} is no function, and has none of the methods "
            f"{', '.join(_CALLED)}. Give a function of a step: step.metrics, step.stop()."
        )
    if others := sorted(methods - {*_CALLED, "on_init_end"}):
        raise ValueError(
            f"callbacks: {type(callback).__name__} has {', '.join(others)}, which no run here "
            f"calls. It calls {', '.join(_CALLED)}; what is before and after training stands "
            "around train()."
        )
    state = SimpleNamespace(global_step=0, log_history=[], is_world_process_zero=True,
                            is_local_process_zero=True)  # fmt: skip

    def call(step: Step) -> None:
        logs = {name: value for name, value in step.metrics.items() if math.isfinite(value)}
        state.global_step = step.number * updates
        state.log_history.append({**logs, "step": state.global_step})
        control = SimpleNamespace(should_training_stop=False)
        evaluated = {name: value for name, value in logs.items() if "eval" in name}
        for name, is_due, more in (
            ("on_step_end", step.number > 0, {}),
            ("on_log", True, {"logs": logs}),
            ("on_evaluate", bool(evaluated), {"metrics": evaluated}),
        ):
            if name in methods and is_due:
                control = getattr(callback, name)(args, state, control, **more) or control
        if control.should_training_stop:
            step.stop()

    return call
