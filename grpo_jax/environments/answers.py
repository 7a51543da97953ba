"""What environments answer, and what `Live` keeps of an episode that goes on."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.environments.wire import Line
from grpo_jax.rewards import worker

INVALID = ("env_died", "env_start", "reward_failed")  # outcomes that the policy did not cause


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of an episode."""

    tool_seconds: float = 10.0  # of one call, also of `reset`, `respond` and `get_reward`
    episode_seconds: float = 300.0  # of all calls together


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a request for an episode."""

    row: int
    kind: str  # "reset", "act" or "finish"
    # That the environment says; of a reset one message of role "user", which is added to the
    # prompt, or none. None after an act: the episode ends.
    messages: list[dict[str, Any]] | None = None
    # Why the episode ends: "tool_timeout", "time", or one of INVALID; None: as it should.
    outcome: str | None = None
    reward: float | None = None  # of `get_reward`; None: no opinion; NaN: it is not known
    turn_reward: float | None = None
    seconds: float = 0.0  # in the environment
    num_calls: int = 0  # malformed ones included
    # Of each call that failed: "error", "timeout", "memory", "unknown" (no such tool) or
    # "malformed:KIND"
    failures: tuple[str, ...] = ()
    message: str = ""  # about a failure that is not the policy's
    # By reward functions that take `environments`, by name: what a reward's worker would answer.
    scored: dict[str, worker.Answer] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Seat:
    """One process."""

    number: int
    line: Line
    made: set[str | None] = dataclasses.field(default_factory=set)  # environments it has made
    row: int | None = None
    is_lost: bool = False


@dataclasses.dataclass(eq=False)
class Episode:
    row: int
    begin: dict[str, Any]  # the request that begins it
    seat: Seat | None = None
    request: dict[str, Any] = dataclasses.field(default_factory=dict)  # the trainer's, last
    # Requests that the process has answered, with what it said: to repeat them in another.
    past: list[tuple[dict[str, Any], Any]] = dataclasses.field(default_factory=list)
    todo: collections.deque = dataclasses.field(default_factory=collections.deque)
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of the request sent
    said: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of the turn, before it
    failures: list[str] = dataclasses.field(default_factory=list)  # of the turn
    deadline: float = math.inf
    sent: float = 0.0
    limit_s: float = 0.0  # of the request sent
    seconds: float = 0.0
    turn_seconds: float = 0.0
    timeouts: int = 0
    is_again: bool = False  # it has been repeated after a failure
    can_repeat: bool = True  # no call was interrupted


NEW = object()  # in place of what is expected: the request has not been answered before


def what(request: dict[str, Any], done: dict[str, Any], parts: list[dict[str, Any]]) -> Any:
    """What a process said, to be compared with what another says."""
    if request["kind"] == "act":
        said = done["messages"]
        return [part["message"] for part in parts] if parts else said
    return done.get("text")


def failures(request: dict[str, Any], failed: Sequence[str]) -> list[str]:
    """The kinds of the failures of a request's calls."""
    kinds = []
    for call, failure in zip(request.get("calls", ()), failed):
        if failure:
            kinds.append(f"malformed:{call['malformed']}" if "malformed" in call else failure)
    return kinds


def scored(fields: dict[str, Any]) -> worker.Answer:
    """A reward function's answer as its process wrote it: JSON has no numbers as keys."""
    faults = {int(row): text for row, text in fields["faults"].items()}
    metrics = {name: tuple(pair) for name, pair in fields["metrics"].items()}
    return worker.Answer(**fields | {"faults": faults, "metrics": metrics})
