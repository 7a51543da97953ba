"""The process in which reward functions run: it can be killed, and its memory is limited.

Its keeper starts it with one end of a pipe. It receives the rewards once, then answers one call
after the other. It does not limit time itself, since a function may block the interpreter forever.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import math
import os
import re
import resource
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from grpo_jax.messages.credentials import redact
from grpo_jax.messages.values import counted, cut, shown
from grpo_jax.rewards import given as given_lib
from grpo_jax.rewards import keeper, place, registry, sources
from grpo_jax.rewards import values as values_lib

if TYPE_CHECKING:
    import asyncio

_METRIC = re.compile(r"[\w.:\-]{1,100}")  # reward_log/NAME is one of the run's metrics
_MAX_EXTRA_CHARS = 10_000  # in a text of the table of samples


@dataclasses.dataclass(frozen=True)
class Setup:
    """The worker's setup, received once."""

    specs: tuple[str, ...]
    names: tuple[str, ...]
    memory_bytes: int  # 0: no limit
    max_completion_tokens: int
    sources: dict[str, sources.Source]  # of the user's modules, by name
    given: dict[str, bytes] = dataclasses.field(default_factory=dict)  # from `given.pickled`


@dataclasses.dataclass(frozen=True)
class Call:
    """One reward function on some completions; row i of every list belongs to completion i."""

    reward: int  # index in Setup
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]] | None
    columns: dict[str, list]
    trainer_state: dict[str, Any]
    rendered_prompts: list[str] | None = None

    def row(self, i: int) -> Call:
        """The same call for one completion alone."""
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
    """The outcome of a call, in Python's own types, so that it can always be pickled."""

    values: list[float] | None  # NaN for None; None if the call failed
    seconds: float
    failure: str = ""  # "error", "values" or "memory"; the pool adds "timeout" and "died"
    message: str = ""
    faults: dict[int, str] = dataclasses.field(default_factory=dict)  # rows with an invalid value
    kinds: dict[int, str] = dataclasses.field(default_factory=dict)  # of these; "values" if not
    metrics: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)  # sum, count
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # as in `Scores`
    extras: dict[str, list] = dataclasses.field(default_factory=dict)
    steps: list | None = None  # of each completion, as in `Scores`
    is_spent: bool = False  # this process must be replaced


def answer(found: Callable, name: str, call: Call, max_completion_tokens: int) -> Answer:
    """The outcome of one call; the function may do anything, as long as it returns or raises."""
    metrics: dict[str, tuple[float, int]] = {}
    extras: dict[str, list] = {}
    steps: list[list] = []
    given = _given(call, max_completion_tokens, metrics, extras, steps)
    began = time.monotonic()
    try:
        got = found(**{n: given[n] for n in registry.accepted(found, given)})
        if inspect.isawaitable(got):
            got = waited_for(got)
        numbers_B, faults = values_lib.read(name, got, call.completions)
    except values_lib.WrongValuesError as error:
        return Answer(None, time.monotonic() - began, "values", f"{error}{_stands(found)}")
    except MemoryError:
        message = f"The reward {name!r} asked for more memory than rewards.memory_limit_gib allows."
        return Answer(None, time.monotonic() - began, "memory", message, is_spent=True)
    except BaseException as error:  # a user's function may fail in any way, SystemExit included
        message = _told(error, found, name, call)
        return Answer(None, time.monotonic() - began, "error", message)
    num = len(numbers_B)
    return Answer(
        numbers_B,
        time.monotonic() - began,
        faults={row: f"{fault}{_stands(found)}" for row, fault in faults.items()},
        metrics=metrics,
        extras={n: v for n, v in extras.items() if len(v) == num},
        steps=steps or None,
    )


def _given(
    call: Call,
    max_completion_tokens: int,
    metrics: dict[str, tuple[float, int]],
    extras: dict[str, list],
    steps: list[list],
) -> dict[str, Any]:
    """All possible arguments of a function, by name; its logs go to the last three."""

    def log_metric(name: str, value: float) -> None:
        name = _text(name)
        if not _METRIC.fullmatch(name):
            raise ValueError(f"log_metric takes names of letters, digits and _.:-, not {name!r}.")
        total, count = metrics.get(name, (0.0, 0))
        metrics[name] = (total + float(value), count + 1)

    def log_extra(column: str, values: list) -> None:
        extras[_text(column)] = [_extra(v) for v in values]

    def log_steps(of_completions: list[list]) -> None:
        found = [_steps(pairs) for pairs in of_completions]
        if len(found) != len(call.completions):
            raise ValueError(
                f"log_steps got the steps of {len(found)} completions, and there are "
                f"{len(call.completions)}."
            )
        steps[:] = found

    given = {name: list(column) for name, column in call.columns.items()}  # copies
    given |= {
        "prompts": list(call.prompts),
        "completions": list(call.completions),
        "max_completion_tokens": max_completion_tokens,
        "trainer_state": types.SimpleNamespace(**call.trainer_state),
        "log_metric": log_metric,
        "log_extra": log_extra,
        "log_steps": log_steps,
    }
    if call.completion_ids is not None:
        given["completion_ids"] = call.completion_ids
    if call.rendered_prompts is not None:
        given["rendered_prompts"] = list(call.rendered_prompts)
    return given


def _steps(pairs: Any) -> list[list]:
    """The steps of a completion, in order; ValueError for what is none."""
    found = [[int(end), float(value)] for end, value in pairs]
    ends = [end for end, _ in found]
    if sorted({*ends}) != ends or min(ends, default=0) < 0:
        raise ValueError(f"log_steps takes ends of steps that rise from 0 on, not {ends[:20]}.")
    if not all(math.isfinite(value) for _, value in found):
        raise ValueError(f"log_steps takes finite values, not {[v for _, v in found][:20]}.")
    return found


def _extra(value: Any) -> Any:
    """A value for the table of samples: None, a finite number, or a text, cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return shown(int(value)) if value.bit_length() > 998 else int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return _text(value)


def _text(value: Any) -> str:
    """A plain `str`: a subclass might not pass through the pipe."""
    return cut("".join([str(value)]), _MAX_EXTRA_CHARS)


# --- What goes wrong ------------------------------------------------------------------------------


def _told(error: BaseException, found: Callable, name: str, call: Call) -> str:
    """The message for an error in a function: the error, its location, and the arguments."""
    where = place.of_error(error, found)
    return (
        f"The reward {name!r} raised {type(error).__name__}: {said(error)}"
        f"{f' ({where})' if where else ''}. It was called with "
        f"{counted(len(call.completions), 'completion')} and the columns {sorted(call.columns)}; "
        f"the first completion was {shown(call.completions[0])}."
    )


def said(error: BaseException, limit: int = 300) -> str:
    """An error's text without secrets, then cut: half of a secret would not be recognized."""
    try:
        text = str(error)
    except Exception as second:  # user code makes the text, too
        return f"(its text cannot be read: {type(second).__name__})"
    return redact(text[:5000])[:limit]


def _stands(found: Callable) -> str:
    where = place.of_function(found)
    return f" The function: {where}" if where else ""


# --- Asynchronous functions -----------------------------------------------------------------------


def waited_for(awaitable: Awaitable) -> Any:
    """The result of an awaitable; raises its error."""
    import asyncio  # takes half of a worker's start, and most functions are not asynchronous

    future = asyncio.run_coroutine_threadsafe(_outcome(awaitable), _loop())
    try:
        result, error = future.result()
    except BaseException:  # this thread was interrupted
        future.cancel()
        raise
    if error is not None:
        raise error
    return result


async def _outcome(awaitable: Awaitable) -> tuple[Any, BaseException | None]:
    try:
        return await awaitable, None
    except BaseException as error:  # SystemExit would end the loop
        return None, error


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The process's only event loop, as in TRL, so that a client stays connected between calls.

    It runs in its own thread, also between calls.
    """
    import asyncio

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asynchronous rewards", daemon=True).start()
    return loop


# --- The process ----------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Answers the calls that come through the pipe until it is closed."""
    hide_secrets()
    pipe = Connection(descriptor)
    os.set_inheritable(descriptor, False)  # programs that a function starts cannot answer,
    os.register_at_fork(after_in_child=pipe.close)  # nor can forks of this process
    setup: Setup = pipe.recv()
    if setup.memory_bytes:
        # Limits writable memory, not address space: libraries reserve far more than they use. The
        # function sees a MemoryError; memory that this does not count, the keeper counts.
        resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
    sys.meta_path.insert(0, sources.Finder(setup.sources))
    try:
        given_lib.receive(setup.given)
        functions = [registry.function(spec) for spec in setup.specs]
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {said(error, 1000)}")
        return
    pipe.send(None)  # ready
    try:
        _serve(pipe, functions, setup)
    except (EOFError, ConnectionError):  # the pool is gone
        os._exit(0)
    except MemoryError:  # too little memory is left for a call or its answer
        os._exit(keeper.OUT_OF_MEMORY)


def _serve(pipe: Connection, functions: list[Callable], setup: Setup) -> None:
    while True:
        number, call = pipe.recv()
        name = setup.names[call.reward]
        done = answer(functions[call.reward], name, call, setup.max_completion_tokens)
        if pipe.closed:  # a fork, made by the function, has returned here
            os._exit(0)
        del call
        pipe.send((number, dataclasses.replace(done, is_spent=done.is_spent or not _can_speak())))


def _can_speak() -> bool:
    """Whether the output streams are open; a function may have closed them."""
    try:
        os.fstat(1), os.fstat(2)
        return not (sys.stdout.closed or sys.stderr.closed)
    except (OSError, AttributeError, ValueError):
        return False


class Hiding(io.TextIOWrapper):
    """An output stream that hides keys and passwords, also in tracebacks of any thread.

    A failed write, as when nobody reads the output any more, is not a failure of the reward.
    """

    def write(self, text: str) -> int:
        try:
            super().write(redact(text))
        except OSError:
            pass
        return len(text)


def hide_secrets() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        encoding, errors = stream.encoding, stream.errors
        hiding = Hiding(stream.detach(), encoding=encoding, errors=errors, line_buffering=True)
        setattr(sys, name, hiding)
        setattr(sys, f"__{name}__", hiding)
