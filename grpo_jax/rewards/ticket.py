"""Pending scores of one batch, filled in call by call."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from grpo_jax.rewards import scores
from grpo_jax.rewards.registry import Reward
from grpo_jax.rewards.scores import Failure, RewardError, Scores
from grpo_jax.rewards.worker import Answer


class Ticket:
    """The pending scores of a batch."""

    def __init__(self, rewards: Sequence[Reward], rows: int):
        self._rewards, self._rows = rewards, rows
        shape = (len(rewards), rows)
        self._values = np.full(shape, np.nan, np.float32)
        self._failed = np.zeros(shape, bool)
        self._seconds = np.zeros(shape)
        self._failures: list[Failure] = []
        self._metrics: dict[str, tuple[float, int]] = {}
        self._sums: dict[str, float] = {}
        self._extras: dict[str, list] = {}
        self._steps: dict[str, list] = {}
        self._retried: dict[str, tuple[int, str]] = {}
        self._open = len(rewards) * rows
        self._lock, self._done = threading.Lock(), threading.Event()
        self._fault: str | None = None
        if not self._open:
            self._done.set()

    def result(self) -> Scores:
        """Waits for all scores. Raises RewardError if no worker can be started."""
        while not self._done.wait(timeout=1.0):  # with a timeout, so that signals are handled
            pass
        if self._fault:
            raise RewardError(self._fault)
        named = lambda array: {r.name: array[i] for i, r in enumerate(self._rewards)}  # noqa: E731
        by_name, failed = named(self._values), named(self._failed)
        order = sorted(self._failures, key=lambda f: (f.row, f.reward))
        return Scores(
            reward_B=scores.combine(self._rewards, by_name, failed)
            if self._rewards
            else np.full(self._rows, np.nan, np.float32),
            by_name=by_name,
            failed=failed,
            seconds=named(self._seconds),
            failures=tuple(order),
            metrics=self._metrics,
            sums=self._sums,
            extras=self._extras,
            steps=self._steps,
            retried=self._retried,
        )

    def progress(self) -> tuple[int, int]:
        """The number of rewards that have arrived, and of all rewards."""
        total = len(self._rewards) * self._rows
        return (total if self._done.is_set() else total - self._open), total

    def fill(self, reward: int, rows: range, answer: Answer) -> None:
        """Records the outcome of one call (of one completion, if it failed); any thread may."""
        with self._lock:
            self._fill(reward, rows, answer)

    def _fill(self, reward: int, rows: range, answer: Answer) -> None:
        self._seconds[reward, rows] = answer.seconds / len(rows)
        faults = answer.faults
        if answer.values is None:
            faults = dict.fromkeys(range(len(rows)), answer.message)
        else:
            self._values[reward, rows] = answer.values
        for i, message in faults.items():
            self._failed[reward, rows[i]] = True
            kind = answer.failure or answer.kinds.get(i, "values")
            self._failures.append(Failure(self._rewards[reward].name, rows[i], kind, message))
        for name, (total, count) in answer.metrics.items():
            before = self._metrics.get(name, (0.0, 0))
            self._metrics[name] = (before[0] + total, before[1] + count)
        for name, total in answer.sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
        for name, values in answer.extras.items():
            column = self._extras.setdefault(name, [None] * self._rows)
            column[rows.start : rows.stop] = values
        if answer.steps is not None and self._rewards[reward].by_step:
            column = self._steps.setdefault(self._rewards[reward].name, [None] * self._rows)
            column[rows.start : rows.stop] = answer.steps
        self._open -= len(rows)
        if not self._open:
            self._done.set()

    def note_retry(self, reward: int, message: str) -> None:
        """Records that a call for several completions failed, and is repeated for each alone."""
        name = self._rewards[reward].name
        count, first = self._retried.get(name, (0, message))
        self._retried[name] = (count + 1, first)

    def end(self, fault: str) -> None:
        """Makes `result` raise RewardError: there will be no scores."""
        self._fault = fault
        self._done.set()
