"""One episode, and what is told of the episodes of a step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from grpo_jax.environments.live import INVALID, Answer
from grpo_jax.environments.rewriting import Rewriting
from grpo_jax.environments.turns import Turn
from grpo_jax.rewards import worker

OUTCOMES = ("done", "turns", "tokens", "time", "tool_timeout", *INVALID)
LATE = ("tool_timeout", "time")  # outcomes by which the policy may have lost its environment


class Dialogue(Protocol):
    """How the turns of a conversation are written and read; see `dialogue.Dialogue`."""

    def parse(self, turn_ids: Sequence[int]) -> Turn: ...

    def follow(
        self, turn_ids: Sequence[int], stopped: bool, messages: list[dict[str, Any]]
    ) -> list[int]: ...

    @property
    def rewriting(self) -> Rewriting | None: ...  # only read where episodes fork


class World(Protocol):
    """The environments of this process; see `live.Live`."""

    num_live: int
    num_lost: int

    def reset(self, row: int, columns: dict[str, Any], seed: int, rollout_seed: int) -> None: ...

    def act(self, row: int, turn: Turn, messages: list[dict[str, Any]]) -> None: ...

    def finish(
        self,
        row: int,
        messages: list[dict[str, Any]],
        columns: dict[str, Any],
        completion_ids: list[int],
        prompt: Any = None,
    ) -> None: ...

    def answers(self, timeout_s: float) -> list[Answer]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of an episode and of one turn."""

    turns: int
    tokens: int  # of an episode, those of the environment included
    turn_tokens: int  # of one turn of the policy


@dataclasses.dataclass
class Episode:
    """One episode. Its tokens are known where its row is held, its messages where it is owned."""

    row: int
    prompt: list[int]
    columns: dict[str, Any]
    messages: list[dict[str, Any]]
    first: int = 0  # messages of the prompt
    tail: int = 0  # tokens at the prompt's end that only the first part has
    begun: str = ""  # what the reset said
    # Turns of the policy, each with what the environment said then
    steps: list[tuple[dict[str, Any], list[dict[str, Any]]]] = dataclasses.field(
        default_factory=list
    )
    ids: list[int] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)
    length: int = 0
    turn: list[int] = dataclasses.field(default_factory=list)  # the policy's last one
    # Of the policy's turns, in tokens of the completion: first, and one past the last
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    # Where further parts begin, in tokens of the completion. A part is the prompt without its tail,
    # and its own tokens
    begins: list[int] = dataclasses.field(default_factory=list)
    rewritten: int = 0  # tokens in which further parts repeat the conversation
    # `said_ids` of an episode with several parts, with their log-probabilities as in `logp`
    once: tuple[list[int], list[float]] | None = None
    stopped: bool = False  # whether the last turn ended by a stop token
    outcome: str = ""  # "": it goes on
    reward: float | None = None  # of `get_reward`; None: no opinion, or none
    # By name, of the reward functions that take `environments`
    scored: dict[str, worker.Answer] = dataclasses.field(default_factory=dict)
    turn_rewards: list[float] = dataclasses.field(default_factory=list)
    calls: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)  # kinds
    fault: str = ""  # of its environment, for messages
    observed: int = 0  # tokens of the environment
    seconds: float = 0.0  # of the environment

    @property
    def replies(self) -> list[dict[str, Any]]:
        """The messages after the prompt."""
        return self.messages[self.first :]

    @property
    def said_ids(self) -> list[int]:
        """The tokens of the conversation as they were drawn and said, each once."""
        return self.said[0]

    @property
    def said(self) -> tuple[list[int], list[float]]:
        """`said_ids`, and the log-probabilities of those that the policy drew; 0 of the others."""
        return (self.ids, self.logp) if self.once is None else self.once

    @property
    def num_context(self) -> int:
        """Tokens that the next turn follows, the prompt's included."""
        if not self.begins:
            return len(self.prompt) + self.length
        return len(self.prompt) - self.tail + self.length - self.begins[-1]

    @property
    def context(self) -> list[int]:
        """The tokens that the next turn follows."""
        if not self.begins:
            return self.prompt + self.ids
        return self.prompt[: len(self.prompt) - self.tail] + self.ids[self.begins[-1] :]

    def add(self, ids: Sequence[int], logp: Sequence[float]) -> None:
        """Appends tokens that the policy drew."""
        self._append([int(i) for i in ids], [float(x) for x in logp])

    def _append(self, ids: list[int], logp: list[float]) -> None:
        for known in ((self.ids, self.logp), self.once or ([], [])):
            known[0].extend(ids)
            known[1].extend(logp)

    @property
    def forked(self) -> bool:
        """Whether the next turn is the first of a further part."""
        return bool(self.begins) and self.begins[-1] >= self.spans[-1][1]

    def go_on(self, ids: Sequence[int], context: Sequence[int] | None, *, is_held: bool) -> None:
        """Appends what the environment said; with a `context`, begins a part with that instead."""
        if context is not None:
            known_ids, known_logp = self.said
            self.once = [*known_ids, *ids], [*known_logp, *[0.0] * len(ids)]
            self.begins.append(self.length)
            self.rewritten += len(context)
        more = [int(i) for i in (ids if context is None else context)]
        self.length += len(more)
        if is_held and context is None:
            self._append(more, [0.0] * len(more))
        elif is_held:
            self.ids += more
            self.logp += [0.0] * len(more)


@dataclasses.dataclass(frozen=True)
class Told:
    """What all processes know of a step's episodes, in the order of their rows."""

    outcomes: list[str]
    turns_B: np.ndarray  # int64
    calls_B: np.ndarray  # int64
    observed_B: np.ndarray  # int64: tokens of the environment
    seconds_B: np.ndarray  # float64: of the environment
    failures: dict[str, int]  # calls by kind
    idle_s: float  # time in which the device waited for answers
    read_again: int  # tokens of prefixes that were computed once more
    drawn: int  # tokens that the policy drew
    ends: list[list[int]]  # of each episode's turns, in tokens of the completion
    turn_rewards: list[list[float]]  # of its turns; those of the last ones may lack
    live: int  # processes of environments
    restarts: int  # of them so far in the run, since one was lost
    # int64: further parts, and their tokens that repeat the conversation; None: no episode forks
    parts_B: np.ndarray | None = None
    rewritten_B: np.ndarray | None = None

    @property
    def invalid_B(self) -> np.ndarray:  # noqa: N802
        """Episodes that ended through no fault of the policy; bool."""
        return np.array([outcome in INVALID for outcome in self.outcomes])

    def metrics(self) -> dict[str, float]:
        """Metrics of the episodes, by their logged names."""
        calls, episodes = int(self.calls_B.sum()), len(self.outcomes)
        low, high = np.quantile(self.seconds_B, [0.5, 0.95])
        values = {
            "environment/turns": self.turns_B.mean(),
            "environment/calls": calls / episodes,
            "environment/observation_tokens": self.observed_B.mean(),
            "environment/seconds_p50": low,
            "environment/seconds_p95": high,
            "environment/seconds_max": self.seconds_B.max(),
            "environment/idle_s": self.idle_s,
            "environment/read_again": self.read_again / max(self.drawn, 1),
            "environment/processes": self.live,
            "environment/restarts": self.restarts,
        }
        if self.parts_B is not None:
            values["environment/forks"] = self.parts_B.mean()
            values["environment/rewritten_tokens"] = self.rewritten_B.mean()
        if calls:
            values["environment/valid_calls"] = 1 - sum(self.failures.values()) / calls
        for outcome in OUTCOMES:
            values[f"environment/ended/{outcome}"] = self.outcomes.count(outcome) / episodes
        for kind, number in self.failures.items():
            values[f"environment/failed_calls/{kind.replace(':', '_')}"] = number
        return {name: float(value) for name, value in values.items()}


def joined(told: Sequence[Told]) -> Told:
    """What is told of the episodes of several draws."""
    if len(told) == 1:
        return told[0]
    together = lambda name: np.concatenate([getattr(part, name) for part in told])  # noqa: E731
    failures: collections.Counter[str] = collections.Counter()
    for part in told:
        failures.update(part.failures)
    return Told(
        [outcome for part in told for outcome in part.outcomes],
        *(together(name) for name in ("turns_B", "calls_B", "observed_B", "seconds_B")),
        dict(failures),
        *(sum(getattr(part, name) for part in told) for name in ("idle_s", "read_again", "drawn")),
        *([x for part in told for x in getattr(part, n)] for n in ("ends", "turn_rewards")),
        told[-1].live,
        told[-1].restarts,
        *(() if told[0].parts_B is None else map(together, ("parts_B", "rewritten_B"))),
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """Where an episode begins: its prompt's problem, and the seeds of its environment."""

    prompt: Any  # a text or messages
    columns: dict[str, Any]
    seed: int  # the same for a group
    dialogue: Dialogue
    # Token ids of a prompt with the text of `reset`; None: that of the problem as it is
    with_text: Callable[[str], list[int]]
    arguments: dict[str, Any] | None = None  # of the template; None: those of the dialogue
