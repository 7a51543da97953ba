"""The process in which reward functions run: it can be killed, and holds a bounded memory.

Started by `pool.Pool` with one end of a pipe. It is told the rewards once, then answers one call
after the other; nothing here limits time, since a function may hold the interpreter for good.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import numbers
import os
import re
import resource
import signal
import sys
import time
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from grpo_jax.messages import shown
from grpo_jax.rewards import reward as reward_lib

_METRIC = re.compile(r"[\w.:\-]{1,100}")  # reward_log/NAME stands among the run's metrics
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a worker needs to know once."""

    specs: tuple[str, ...]
    names: tuple[str, ...]
    memory_bytes: int  # 0: no limit
    max_completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One reward function on some completions; row i of every list belongs to completion i."""

    reward: int  # its number in Setup
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]] | None
    columns: dict[str, list]
    trainer_state: dict[str, Any]
    rendered_prompts: list[str] | None = None

    def row(self, i: int) -> Call:
        """The same for one completion alone."""
        return dataclasses.replace(
            self,
            prompts=[self.prompts[i]],
            completions=[self.completions[i]],
            completion_ids=None if self.completion_ids is None else [self.completion_ids[i]],
            columns={name: [values[i]] for name, values in self.columns.items()},
            rendered_prompts=None if self.rendered_prompts is None else [self.rendered_prompts[i]],
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a call."""

    values: list[float] | None  # NaN where the function gave None; None: it failed
    seconds: float
    failure: str = ""  # "error", "values" or "memory"; the pool adds "timeout" and "died"
    message: str = ""
    metrics: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)  # sum, count
    extras: dict[str, list] = dataclasses.field(default_factory=dict)


class WrongValuesError(ValueError):
    """A reward function gave what is not one finite number, or None, per completion."""


def answer(found: Callable, name: str, call: Call, max_completion_tokens: int) -> Answer:
    """The outcome of one call, whatever the function does, as long as it returns or raises."""
    metrics: dict[str, tuple[float, int]] = {}
    extras: dict[str, list] = {}

    def log_metric(name: str, value: float) -> None:
        if not _METRIC.fullmatch(str(name)):
            raise ValueError(f"log_metric takes names of letters, digits and _.:-, not {name!r}.")
        total, count = metrics.get(name, (0.0, 0))
        metrics[str(name)] = (total + float(value), count + 1)

    def log_extra(column: str, values: list) -> None:
        extras[str(column)] = [v if isinstance(v, (int, float)) else str(v) for v in values]

    given = {name: list(values) for name, values in call.columns.items()}  # its own to change
    given |= {
        "prompts": list(call.prompts),
        "completions": list(call.completions),
        "max_completion_tokens": max_completion_tokens,
        "trainer_state": types.SimpleNamespace(**call.trainer_state),
        "log_metric": log_metric,
        "log_extra": log_extra,
    }
    if call.completion_ids is not None:
        given["completion_ids"] = call.completion_ids
    if call.rendered_prompts is not None:
        given["rendered_prompts"] = list(call.rendered_prompts)
    began = time.monotonic()
    try:
        values = found(**{n: given[n] for n in reward_lib.accepted(found, given)})
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
        numbers_B = _numbers(name, values, call.completions)
    except WrongValuesError as error:
        return Answer(None, time.monotonic() - began, "values", str(error))
    except MemoryError:
        message = f"The reward {name!r} asked for more memory than rewards.memory_gb allows."
        return Answer(None, time.monotonic() - began, "memory", message)
    except BaseException as error:  # a user's function may fail in any way, SystemExit included
        message = (
            f"The reward {name!r} raised {type(error).__name__}: {str(error)[:300]}. It was called "
            f"with {len(call.completions)} completions and the columns {sorted(call.columns)}; the "
            f"first completion was {shown(call.completions[0])}."
        )
        return Answer(None, time.monotonic() - began, "error", message)
    num = len(numbers_B)
    extras = {n: v for n, v in extras.items() if len(v) == num}
    return Answer(numbers_B, time.monotonic() - began, metrics=metrics, extras=extras)


async def _awaited(values: Any) -> Any:
    return await values


def _numbers(name: str, values: Any, completions: list[Any]) -> list[float]:
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = list(values)
    if not isinstance(values, (list, tuple)):
        raise WrongValuesError(
            f"The reward {name!r} returned a {type(values).__name__}; it must return a list "
            "of one number, or None, per completion."
        )
    if len(values) != len(completions):
        raise WrongValuesError(
            f"The reward {name!r} returned {len(values)} values for {len(completions)} "
            "completions; it must return one number, or None, for each."
        )
    return [_number(name, i, v, completions[i]) for i, v in enumerate(values)]


def _number(name: str, row: int, value: Any, completion: Any) -> float:
    if value is None:
        return math.nan
    is_number = isinstance(value, (numbers.Real, np.bool_))
    if isinstance(value, np.generic):
        value = value.item()
    # Compared before converting: what float32 cannot hold would become an infinity.
    if is_number and abs(value) <= FLOAT32_MAX:
        return float(value)
    what = "beyond finite float32" if is_number else "not a number"
    raise WrongValuesError(
        f"The reward {name!r} returned {shown(value)} ({type(value).__name__}) for row {row}, "
        f"which is {what}. Return a finite number, or None to give no reward. Its completion was "
        f"{shown(completion)}."
    )


# --- The process ----------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Answers the calls that come through the pipe until it is closed."""
    _die_with_parent()
    pipe = Connection(descriptor)
    setup: Setup = pipe.recv()
    if setup.memory_bytes:
        # Memory that can be written, not address space: libraries reserve far more than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
    try:
        functions = [reward_lib.function(spec) for spec in setup.specs]
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)  # ready
    while True:
        try:
            call: Call = pipe.recv()
        except EOFError:  # the pool is gone
            os._exit(0)
        name = setup.names[call.reward]
        done = answer(functions[call.reward], name, call, setup.max_completion_tokens)
        del call
        pipe.send(done)


def _die_with_parent() -> None:
    """A worker that hangs must not outlive a trainer that was killed (Linux; elsewhere it may)."""
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
