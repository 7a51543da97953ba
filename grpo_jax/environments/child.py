"""The process of one live environment: it makes the instance, and answers one request at a time.

It is forked from the process that has imported the user's module (`forking.py`), knows no JAX, and
may do anything: the trainer kills it with all that it started. Requests are pickled dicts, answers
are JSON: `{"id", "note"}` as a request goes on, `{"id", "part"}` for each call of a tool, and
`{"id", "done"}` or `{"id", "fault"}` at its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import numbers
import os
import pickle
import random
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.environments import clock, described, wire
from grpo_jax.environments.described import CLASSES, RefusedError, told
from grpo_jax.messages.credentials import redact
from grpo_jax.rewards import keeper, place, registry, worker

_MAX_CHARS = 100_000  # of a text for the policy; the rest of the cut is made in tokens
_MAX_PRINTED = 20_000  # characters that an episode may print


@dataclasses.dataclass(frozen=True)
class Found:
    """The user's objects, as the options name them."""

    tools: dict[str, Callable]  # by name
    specs: dict[str, str]  # of the tools, by name
    classes: dict[str | None, tuple[str, Callable]]  # spec and class, by the column `environment`
    rewards: dict[str, Callable]  # reward functions that take `environments`
    memory_bytes: int  # that an environment may add to what was imported; 0: no limit


class Host:
    """The instances of this process, and the episode that goes on."""

    def __init__(self, found: Found, tell: Callable[[dict], None]):
        self._found, self._tell = found, tell
        self._instances: dict[str | None, Any] = {}
        self._now: Any = None  # the instance of the episode
        self._tools: dict[str, Callable] = {}

    def describe(self, limit_s: float) -> dict:
        """The kinds of all environments, each as a dict, by name."""
        alone = described.kind_of_tools(self._found.tools, self._found.specs)
        kinds = {}
        for name, (spec, _) in self._found.classes.items():
            began = time.monotonic()
            instance = self._made(name, limit_s)
            seconds = time.monotonic() - began
            kinds[name] = described.kind_of(instance, spec, alone, seconds)
        kinds = kinds or {None: alone}
        return {"kinds": [[name, dataclasses.asdict(kind)] for name, kind in kinds.items()]}

    def _made(self, name: str | None, limit_s: float) -> Any:
        if name not in self._instances:
            spec, factory = self._found.classes[name]
            _seed(0)
            try:
                make = lambda: described.construct(factory, spec)  # noqa: E731
                self._instances[name] = clock.within(limit_s, make)
            except RefusedError as error:
                if isinstance(error.__cause__, clock.TookTooLong):
                    raise error.__cause__ from None
                raise
        return self._instances[name]

    # --- An episode ---

    def reset(self, request: dict) -> dict:
        """Begins an episode; the text that it adds to the prompt, or None."""
        name, columns = request["name"], request["columns"]
        self._tools = dict(self._found.tools)
        self._now = None
        if not self._found.classes:
            return {"text": None}
        spec, _ = self._found.classes[name]
        self._now = self._made(name, request["construct_s"])
        self._tell({"note": "made"})
        self._tools |= {n: method for n, (_, method) in described.tools_of(self._now).items()}
        given = {"seed": request["seed"], "rollout_seed": request["rollout_seed"]}
        named = inspect.signature(self._now.reset).parameters
        given = {n: v for n, v in given.items() if n in named} | columns
        given = {n: given[n] for n in registry.accepted(self._now.reset, given)}
        _seed(request["seed"])
        try:
            text = clock.within(request["limit_s"], lambda: self._now.reset(**given))
        except BaseException as error:
            raise _refused(error, spec, "reset", self._now.reset, sorted(given)) from error
        if text is not None and not isinstance(text, str):
            raise RefusedError(
                f"{CLASSES}: {spec!r}: reset returned a {type(text).__name__}; it returns a text, "
                "which is added to the prompt, or None."
            )
        return {"text": None if text is None else _clean(text)}

    def act(self, request: dict) -> dict:
        """Carries out a turn: its calls, each told as a part, or `respond`."""
        calls, now = request["calls"], self._now
        if hasattr(now, "turn_reward"):
            now.turn_reward = 0.0
        responds = callable(getattr(type(now), "respond", None))
        messages: list | None = None
        if hasattr(type(now), "__turn__"):  # an adapter, whose tools are not ours to call
            messages = self._said(request, "__turn__", calls, request["messages"])
        elif calls and (not responds or any("arguments" in call for call in calls)):
            messages = []  # they are told as parts
            left_s, timeouts = request["left_s"], request["timeouts"]
            for group in _groups(calls, self._is_asynchronous):
                for part in self._carried_out(group, request["limit_s"], left_s):
                    self._tell({"part": part})
                    left_s -= part["seconds"]
                    timeouts += part["failure"] == "timeout"
                if left_s <= 0 or timeouts > 1:  # the episode ends
                    break
        elif responds:
            messages = self._said(request, "respond", request["messages"])
        return {"messages": messages, "turn_reward": _number(getattr(now, "turn_reward", None))}

    def _said(self, request: dict, method: str, *arguments: Any) -> list | None:
        """What a method of the environment answers to a turn, as messages."""
        function, spec = getattr(self._now, method), type(self._now).__name__
        limit_s = min(request["limit_s"], request["left_s"])
        try:
            return _messages(clock.within(limit_s, lambda: function(*arguments)), spec)
        except RefusedError:
            raise
        except BaseException as error:
            raise _refused(error, spec, method, function, ["messages"]) from error

    def _is_asynchronous(self, call: dict) -> bool:
        return inspect.iscoroutinefunction(self._tools.get(call["name"]))

    def _carried_out(self, group: list[dict], limit_s: float, left_s: float) -> Iterator[dict]:
        """The messages of calls: of one, or of several asynchronous ones at once."""
        began, began_boot = time.monotonic(), clock.boot_s()
        late = f"The call took longer than {limit_s:g} s."
        if left_s < limit_s:
            limit_s, late = left_s, "The call took longer than the episode had left."
        if len(group) > 1:
            makes = [lambda c=c: self._tools[c["name"]](**c["arguments"]) for c in group]
            outcomes = clock.together(limit_s, makes)
        else:
            outcomes = [self._one(group[0], limit_s)]
        if sys.platform == "linux" and any(_failure(e) == "timeout" for _, e in outcomes if e):
            keeper.end_what_began_since(began_boot)
        seconds = (time.monotonic() - began) / len(group)
        for call, (result, error) in zip(group, outcomes):
            failure = ""
            if error is not None:
                failure = _failure(error)
                result = {"error": late if failure == "timeout" else _said(error)}
            message = {"role": "tool", "name": call["name"], "content": _text(result)}
            yield {"message": message, "failure": failure, "seconds": seconds}

    def _one(self, call: dict, limit_s: float) -> tuple[Any, BaseException | None]:
        if "arguments" not in call:
            return None, _MalformedError(call["reason"])
        if call["name"] not in self._tools:
            return None, _UnknownToolError(f"Tool {call['name']} not found.")
        tool = self._tools[call["name"]]
        try:
            return clock.within(limit_s, lambda: tool(**call["arguments"])), None
        except BaseException as error:  # SystemExit, too, is the tool's failure
            return None, error

    def finish(self, request: dict) -> dict:
        """The episode's rewards: of `get_reward`, and of functions that take `environments`."""
        now, limit_s = self._now, request["limit_s"]
        reward = None
        if callable(getattr(type(now), "get_reward", None)):
            spec = type(now).__name__
            try:
                value = clock.within(limit_s, now.get_reward)
            except BaseException as error:
                raise _refused(error, spec, "get_reward", now.get_reward, []) from error
            reward = _reward(value, spec)
        scored = {}
        for name, function in self._found.rewards.items():
            call = worker.Call(
                0,
                [request["prompt"]],
                [request["messages"]],
                [request["completion_ids"]],
                {n: [v] for n, v in request["columns"].items()} | {"environments": [now]},
                request["trainer_state"],
            )
            answer = lambda: worker.answer(function, name, call, request["max_tokens"])  # noqa: E731, B023
            done = clock.within(limit_s, answer)
            scored[name] = dataclasses.asdict(done)
            self._tell({"note": "scored"})
        return {"reward": reward, "scored": scored}


class _MalformedError(Exception):
    """A call that could not be read."""


class _UnknownToolError(ValueError):
    """A call of a tool that there is not."""


def _failure(error: BaseException) -> str:
    for kind, name in (
        (clock.TookTooLong, "timeout"),
        (_MalformedError, "malformed"),
        (_UnknownToolError, "unknown"),
        (MemoryError, "memory"),
    ):
        if isinstance(error, kind):
            return name
    return "error"


def _said(error: BaseException) -> str:
    """An error as the policy reads it: its text, without secrets."""
    if isinstance(error, MemoryError):
        return "The call needed too much memory."
    try:
        return redact(str(error)) or type(error).__name__
    except Exception:  # user code makes the text, too
        return type(error).__name__


def _groups(calls: list[dict], is_asynchronous: Callable[[dict], bool]) -> Iterator[list[dict]]:
    """Calls in order: asynchronous ones that follow each other together, others alone."""
    together = lambda call: "arguments" in call and is_asynchronous(call)  # noqa: E731
    for is_group, found in itertools.groupby(calls, together):
        group = list(found)
        yield from [group] if is_group else [[call] for call in group]


def _refused(
    error: BaseException, spec: str, method: str, function: Callable, arguments: list[str]
) -> RefusedError:
    where = place.of_error(error, function)
    what = told(error) if isinstance(error, clock.TookTooLong) else None
    raised = f"raised {type(error).__name__}: {told(error)}"
    return RefusedError(
        f"{CLASSES}: {spec!r}: {method} {what or raised}{where and f' ({where})'}."
        + (f" It got {', '.join(arguments)}." if arguments else "")
    )


# --- Values ---------------------------------------------------------------------------------------


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _text(value: Any) -> str:
    """A tool's result as a text: parts of text joined, anything else as `str` writes it."""
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        value = "\n".join(part["text"] for part in value)
    try:
        return _clean(value if isinstance(value, str) else str(value))
    except BaseException as error:
        return str({"error": f"The result cannot be written ({type(error).__name__})."})


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and "text" in part


def _clean(text: str) -> str:
    """The text in whole characters, its middle left out if it is very long."""
    if len(text) > _MAX_CHARS:
        half = _MAX_CHARS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return text.encode("utf-8", "replace").decode()


def _messages(said: Any, spec: str) -> list | None:
    """What `respond` returned, as messages; None ends the episode."""
    if said is None:
        return None
    if isinstance(said, str):
        return [{"role": "user", "content": _clean(said)}]
    if isinstance(said, dict):
        said = [said]
    is_good = lambda m: isinstance(m, dict) and {"role", "content"} <= m.keys()  # noqa: E731
    if not isinstance(said, list) or not said or not all(map(is_good, said)):
        raise RefusedError(
            f"{CLASSES}: {spec!r}: respond returned a {type(said).__name__}; it returns None, "
            "which ends the episode, a text, or a list of messages with role and content."
        )
    return [{n: _text(v) for n, v in m.items() if isinstance(v, (str, list))} for m in said]


def _number(value: Any) -> float | None:
    if hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


def _reward(value: Any, spec: str) -> float | None:
    number = _number(value)
    if value is not None and number is None:
        raise RefusedError(
            f"{CLASSES}: {spec!r}: get_reward returned {told_value(value)}; it returns a finite "
            "number, or None for no opinion."
        )
    return number


def told_value(value: Any) -> str:
    """A value and its type, for a message."""
    return f"{described.cut(redact(repr(value)[:500]), 80)} ({type(value).__name__})"


# --- The process ----------------------------------------------------------------------------------


class _Printed(worker.Hiding):
    """Output of an episode: without secrets, and no more than an episode may print."""

    left = _MAX_PRINTED

    def write(self, text: str) -> int:
        cls = type(self)
        if cls.left > 0:
            super().write(text[: cls.left])
            cls.left -= len(text)
            if cls.left <= 0:
                super().write("\n[an environment printed more; the rest is left out]\n")
        return len(text)


def main(descriptor: int, found: Found) -> None:
    """Answers requests until the trainer is gone. Does not return."""
    with contextlib.suppress(EOFError, OSError):
        _serve(descriptor, found)
    os._exit(0)


def _serve(descriptor: int, found: Found) -> None:
    sock = socket.socket(fileno=descriptor)
    os.register_at_fork(after_in_child=sock.close)  # a fork of this process cannot answer
    _limit_output()
    _limit_memory(found.memory_bytes)

    def tell(answer: dict) -> None:
        if sock.fileno() == -1:  # a fork, made by the environment, has returned here
            os._exit(0)
        wire.write(sock, json.dumps({"id": request["id"]} | answer).encode())

    host = Host(found, tell)
    while True:
        request = pickle.loads(wire.read(sock))
        began = time.monotonic()
        try:
            tell({"done": _answered(host, request) | {"seconds": time.monotonic() - began}})
        except RefusedError as error:
            tell({"fault": str(error), "seconds": time.monotonic() - began})
        except clock.TookTooLong as error:
            fault = f"{CLASSES}: the environment {error}."
            tell({"fault": fault, "seconds": time.monotonic() - began})
        except MemoryError:
            os._exit(keeper.OUT_OF_MEMORY)


def _answered(host: Host, request: dict) -> dict:
    kind = request["kind"]
    if kind == "describe":
        return host.describe(request["limit_s"])
    if kind == "reset":
        _Printed.left = _MAX_PRINTED
    return {"reset": host.reset, "act": host.act, "finish": host.finish}[kind](request)


def _limit_output() -> None:
    """Python's output goes on to the trainer's, up to a limit; that of other programs is lost."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            raw = open(os.dup(number), "wb", buffering=0)
        except OSError:
            raw = open(os.devnull, "wb", buffering=0)
        stream = _Printed(raw, encoding="utf-8", errors="replace", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def _limit_memory(memory_bytes: int) -> None:
    """Limits the writable memory to what is here and `memory_bytes` more; 0: no limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not memory_bytes:
        return
    limit = _data_bytes() + memory_bytes
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _data_bytes() -> int:
    """Bytes of this process's writable memory; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0
