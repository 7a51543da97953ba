"""Rewards computed in worker processes, so that no reward function can hang or break a run.

A worker that takes too long is killed with everything it started, and replaced; the completion
counts as failed. A call has the completions of one prompt. If it raises, hangs or dies, its
completions are tried again one by one, so that one bad completion does not cost the others their
rewards. A call that returns the wrong number of values is not tried again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.rewards import given, keeper, kinds, registry, sources
from grpo_jax.rewards.process import Worker
from grpo_jax.rewards.registry import Reward
from grpo_jax.rewards.scores import RewardError, Scores
from grpo_jax.rewards.ticket import Ticket
from grpo_jax.rewards.worker import Answer, Call, Setup

_MAX_FALSE_STARTS = 3  # workers in a row that end before they answer anything


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a reward worker."""

    seconds: float = 10.0  # for one completion in one reward function
    memory_bytes: int = 4 << 30  # for a worker process and all that it starts; 0: no limit
    # For a worker to import its functions, and for each function's first answer: it may load a
    # model.
    start_seconds: float = 120.0


@dataclasses.dataclass
class _Task:
    call: Call
    ticket: Ticket
    rows: range
    number: int = 0  # identifies its answer
    is_again: bool = False  # it is repeated, since its worker was lost by another call's fault


class Models(Protocol):
    """What scores completions by the reward models among a pool's rewards."""

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str], group: int
    ) -> dict[str, np.ndarray]:
        """The rewards of each model by its name, float32 [B].

        `texts`: of completions, `group` for each problem. Every process must call it.
        """


class Host(Protocol):
    """What computes the rewards that wait for others in this process, as LLM judges do."""

    def submit(self, name: str, call: Call, done: Callable[[Answer], None]) -> None:
        """Begins a call of the reward `name`; `done` gets its outcome, in any thread."""

    def close(self) -> None:
        """Ends all calls."""


class Pool:
    """Reward functions in `num_workers` processes. A context manager; its end kills them."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        max_completion_tokens: int = 0,
        num_workers: int = 1,
        limits: Limits = Limits(),
        models: Models | None = None,
        host: Host | None = None,
    ):
        """Starts the workers, which import the reward functions in the background.

        `max_completion_tokens`: the run's limit, an argument of reward functions. `models`: scores
        the reward models among the rewards, which the workers do not; the collector of the
        rewards calls it. `host`: computes those that run in this process. None: there are none.
        """
        assert rewards and num_workers > 0
        self.rewards, self.models = list(rewards), models
        of = lambda where: [reward for reward in self.rewards if reward.runs == where]  # noqa: E731
        rewards, self._host, self._of_host = of(kinds.WORKERS), host, of(kinds.HOST)
        self.functions = [*rewards, *self._of_host]  # what a ticket waits for
        self._alone = [registry.flag(reward, "one_by_one") for reward in self.functions]
        num_workers = num_workers if rewards else 0
        self._limits = limits
        self._setup = Setup(
            tuple(r.spec for r in rewards),
            tuple(r.name for r in rewards),
            limits.memory_bytes,
            max_completion_tokens,
            sources.held(),
            given.pickled(r.spec for r in rewards),
        )
        self._typical_s = [0.0] * len(rewards)  # per completion, in successful calls
        self._first_s: list[float | None] = [None] * len(rewards)  # time of a worker's first answer
        self._false_starts = 0
        self._num_calls = 0
        self._queue: collections.deque[_Task] = collections.deque()
        self._lock = threading.Lock()
        self._closing = False
        self._ready = threading.Event()
        self._fault: str | None = None
        self._bell, self._ring = os.pipe()
        os.set_blocking(self._ring, False)
        # The thread that waits for the workers starts them: Linux ends a worker with its parent
        # thread.
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()  # watches the bell and the workers' pipes
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._tasks: dict[Worker, _Task] = {}  # current tasks
        self._thread = threading.Thread(
            target=self._serve, args=(num_workers,), name="rewards", daemon=True
        )
        self._thread.start()

    @property
    def measured(self) -> list[Reward]:
        """The rewards that are not computed from others."""
        return [reward for reward in self.rewards if reward.runs != kinds.OTHERS]

    @property
    def names(self) -> list[str]:
        """The rewards' names, in the config's order."""
        return [reward.name for reward in self.rewards]

    @property
    def accuracy(self) -> str | None:
        """The name of the reward that measures accuracy (1 right, 0 wrong); None if none does."""
        return next((reward.name for reward in self.rewards if reward.gives_accuracy), None)

    def wait_ready(self) -> None:
        """Waits until the workers have imported their functions, or have failed to."""
        while not self._ready.wait(timeout=1.0):
            pass

    def submit(
        self,
        prompts: list[Any],
        completions: list[Any],
        columns: dict[str, list],
        *,
        completion_ids: list[list[int]] | None = None,
        rendered_prompts: list[str] | None = None,
        group: int = 1,
        trainer_state: dict[str, Any] | None = None,
    ) -> Ticket:
        """Submits completions for scoring; row i of every list belongs to completion i.

        A reward function gets `group` consecutive completions per call, or one if it has a true
        attribute `one_by_one`.
        """
        rows = len(completions)
        lengths = {"prompts": len(prompts)} | {n: len(values) for n, values in columns.items()}
        assert set(lengths.values()) == {rows}, f"{rows} completions, but {lengths}"
        ticket = Ticket(self.functions, rows)
        state = trainer_state or {"global_step": 0, "max_steps": 0, "epoch": 0.0}
        tasks = []
        sizes = [1 if alone else group for alone in self._alone]
        for size in sorted(set(sizes), reverse=True):
            for start in range(0, rows, size):
                part = range(start, min(start + size, rows))
                pick = slice(part.start, part.stop)
                for i in (i for i, own in enumerate(sizes) if own == size):
                    call = Call(
                        i,
                        prompts[pick],
                        completions[pick],
                        None if completion_ids is None else completion_ids[pick],
                        {name: values[pick] for name, values in columns.items()},
                        state,
                        None if rendered_prompts is None else rendered_prompts[pick],
                    )
                    if self.functions[i].runs == kinds.HOST:
                        done = functools.partial(ticket.fill, i, part)
                        self._host.submit(self.functions[i].name, call, done)
                        continue
                    tasks.append(_Task(call, ticket, part))
        with self._lock:
            assert not self._closing, "the pool is closed"
            if self._fault:
                ticket.end(self._fault)
            self._queue.extend(tasks)
        self._wake()
        return ticket

    def score(self, *args: Any, **kwargs: Any) -> Scores:
        """The rewards of completions: `submit`, then wait for the result."""
        return self.submit(*args, **kwargs).result()

    def close(self) -> None:
        """Ends the workers; pending calls are dropped."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self._host is not None:
            self._host.close()
        self._wake()
        self._thread.join()
        self._selector.close()
        os.close(self._bell)
        os.close(self._ring)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- The thread that waits for the workers ---

    def _wake(self) -> None:
        try:
            os.write(self._ring, b"!")
        except BlockingIOError:  # the pipe is full: the thread will wake anyway
            pass

    def _serve(self, num_workers: int) -> None:
        try:
            self._workers = [self._new_worker() for _ in range(num_workers)]
            if not self._workers:
                self._ready.set()
            while not self._closing:
                self._hand_out()
                self._wait()
        except BaseException as error:
            if isinstance(error, RewardError):
                self._give_up(str(error))
            else:
                self._give_up(f"The reward workers failed: {type(error).__name__}: {error}")
                raise
        finally:
            for worker in self._workers:
                worker.ask_to_end()
            for worker in self._workers:
                worker.end()
            self._give_up("The reward workers were ended.")

    def _new_worker(self) -> Worker:
        worker = Worker(self._setup, self._limits.start_seconds)
        self._selector.register(worker.pipe, selectors.EVENT_READ)
        return worker

    def _give_up(self, fault: str) -> None:
        with self._lock:
            self._fault = self._fault or fault
            tasks = [*self._queue, *self._tasks.values()]
            self._queue.clear()
        for task in tasks:
            task.ticket.end(self._fault)
        self._ready.set()

    def _is_idle(self, worker: Worker) -> bool:
        return worker.is_ready and worker not in self._tasks

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            if not self._is_idle(worker):
                continue
            with self._lock:
                if not self._queue:
                    return
                task = self._tasks[worker] = self._queue.popleft()
            self._num_calls += 1
            task.number = self._num_calls
            worker.called = time.monotonic()
            worker.deadline = worker.called + self._limit_s(worker, task)
            try:
                worker.pipe.send((task.number, task.call))
            except OSError:
                self._lost(worker, "died")

    def _limit_s(self, worker: Worker, task: _Task) -> float:
        """Time limit of a call.

        It allows for functions that are always slow, and for a first call that loads a model.
        """
        i, limit_s = task.call.reward, self._limits.seconds
        if len(task.rows) > 1:  # allow the usual time of such calls
            limit_s += 4 * len(task.rows) * self._typical_s[i]
        if i in worker.answered:
            return limit_s
        if self._first_s[i] is None:  # no worker has answered yet
            return max(limit_s, self._limits.start_seconds)
        return limit_s + 4 * self._first_s[i]

    def _wait(self) -> None:
        """Waits until a worker answers, dies or is late, or there is a new task."""
        late = min((w.deadline for w in self._workers if not self._is_idle(w)), default=None)
        timeout = None if late is None else max(late - time.monotonic(), 0.0)
        ready = {key.fileobj for key, _ in self._selector.select(timeout)}
        if self._bell in ready:
            os.read(self._bell, 4096)
        for worker in list(self._workers):
            if worker.pipe in ready:
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    self._lost(worker, "died")
                    continue
                self._heard(worker, message)
            elif not self._is_idle(worker) and time.monotonic() >= worker.deadline:
                self._lost(worker, "timeout")

    def _heard(self, worker: Worker, message: Any) -> None:
        if not worker.is_ready:
            if message is not None:
                raise RewardError(f"A reward worker could not start: {message}")
            worker.is_ready, self._false_starts = True, 0
            if all(w.is_ready for w in self._workers):
                self._ready.set()
            return
        number, answer = message
        task = self._tasks.get(worker)
        if task is None or task.number != number:  # not the call that it got
            self._lost(worker, "stray")
            return
        del self._tasks[worker]
        i = task.call.reward
        if answer.values is not None and i in worker.answered:
            mean_s = answer.seconds / len(task.rows)
            self._typical_s[i] = max(mean_s, 0.9 * self._typical_s[i])
        elif i not in worker.answered:
            self._first_s[i] = max(answer.seconds, self._first_s[i] or 0.0)
        if answer.is_spent:
            self._replace(worker)
        self._finish(task, answer, may_repeat=answer.failure == "memory" and worker.num_answered)
        worker.answered.add(i)
        worker.num_answered += 1

    def _finish(self, task: _Task, answer: Answer, *, may_repeat: bool) -> None:
        """Records the outcome of a call, or repeats it: whole, or for each completion alone.

        `may_repeat`: earlier calls in the same worker may have caused the failure.
        """
        if may_repeat and not task.is_again:
            task.is_again = True
            with self._lock:
                self._queue.appendleft(task)
            return
        if answer.values is not None or answer.failure == "values" or len(task.rows) == 1:
            task.ticket.fill(task.call.reward, task.rows, answer)
            return
        task.ticket.note_retry(task.call.reward, answer.message)  # one of them failed: find which
        singles = [
            _Task(task.call.row(i), task.ticket, range(row, row + 1))
            for i, row in enumerate(task.rows)
        ]
        with self._lock:
            self._queue.extendleft(reversed(singles))

    def _replace(self, worker: Worker, *, is_dead: bool = False) -> int:
        """Replaces a worker by a new one; returns the old one's exit code."""
        self._selector.unregister(worker.pipe)
        status = worker.end(is_dead=is_dead)
        self._workers[self._workers.index(worker)] = self._new_worker()
        return status

    def _lost(self, worker: Worker, kind: str) -> None:
        """Replaces a worker that died, is late, or answered a call that it did not get."""
        task = self._tasks.pop(worker, None)
        status = self._replace(worker, is_dead=kind == "died")
        if not worker.is_ready:
            self._count_false_start(kind, status)
        if task is None:
            return
        i, name = task.call.reward, self._setup.names[task.call.reward]
        if kind == "timeout":
            message = self._too_long(i, name, is_first=i not in worker.answered)
        elif status == keeper.OUT_OF_MEMORY:
            kind = "memory"
            message = (
                f"The reward {name!r}, with all that it started, held more memory than "
                "rewards.memory_limit_gib allows."
            )
        else:
            kind = "died"
            message = f"The process of the reward {name!r} ended with status {status}."
        answer = Answer(None, time.monotonic() - worker.called, kind, message)
        may_repeat = kind == "stray" or (kind == "memory" and worker.num_answered > 0)
        self._finish(task, answer, may_repeat=may_repeat)

    def _too_long(self, i: int, name: str, *, is_first: bool) -> str:
        if is_first and self._first_s[i] is None:
            self._first_s[i] = 0.0  # no function loads that long: it hangs
            return (
                f"The reward {name!r} took longer than rewards.start_timeout_s = "
                f"{self._limits.start_seconds:g} s to answer for the first time, and was killed."
            )
        return (
            f"The reward {name!r} took longer than rewards.timeout_s = "
            f"{self._limits.seconds:g} s and was killed."
        )

    def _count_false_start(self, kind: str, status: int) -> None:
        """Raises RewardError if workers repeatedly fail to start."""
        self._false_starts += 1
        if self._false_starts < _MAX_FALSE_STARTS:
            return
        if kind == "timeout":
            what = (
                f"were not ready after rewards.start_timeout_s = {self._limits.start_seconds:g} s"
            )
        else:
            what = f"ended with status {status} before they answered anything"
        raise RewardError(
            f"Reward workers {what}, {self._false_starts} in a row. Try the reward functions with "
            "python -m grpo_jax.score, or raise rewards.start_timeout_s or "
            "rewards.memory_limit_gib."
        )
