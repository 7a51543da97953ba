"""Rewards computed in worker processes, so that no reward function can hang or break a run.

A worker that takes too long is killed with everything it started, and replaced; the completion
counts as failed. Calls hold the completions of one prompt. When a call fails, its completions are
tried again one by one, so that one bad completion costs no other its reward.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

import numpy as np

from grpo_jax.rewards import score as score_lib
from grpo_jax.rewards.reward import Reward
from grpo_jax.rewards.score import Failure, RewardError, Scores
from grpo_jax.rewards.worker import Answer, Call, Setup

_START_LIMIT_S = 300.0  # for a worker to import its reward functions
_MAX_FALSE_STARTS = 3  # workers in a row that end before they answer anything


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one completion may cost."""

    seconds: float = 10.0  # of a reward function for one completion
    memory_bytes: int = 4 << 30  # of a worker process; 0: no limit


class Ticket:
    """Scores that are being computed."""

    def __init__(self, rewards: Sequence[Reward], rows: int):
        self._rewards, self._rows = rewards, rows
        shape = (len(rewards), rows)
        self._values = np.full(shape, np.nan, np.float32)
        self._failed = np.zeros(shape, bool)
        self._seconds = np.zeros(shape)
        self._failures: list[Failure] = []
        self._metrics: dict[str, tuple[float, int]] = {}
        self._extras: dict[str, list] = {}
        self._open = len(rewards) * rows
        self._done = threading.Event()
        self._fault: str | None = None
        if not self._open:
            self._done.set()

    def result(self) -> Scores:
        """The scores, once all are there. Raises RewardError when no worker can be started."""
        while not self._done.wait(timeout=1.0):  # in turns, so that signals are heard
            pass
        if self._fault:
            raise RewardError(self._fault)
        named = lambda array: {r.name: array[i] for i, r in enumerate(self._rewards)}  # noqa: E731
        by_name, failed = named(self._values), named(self._failed)
        order = sorted(self._failures, key=lambda f: (f.row, f.reward))
        return Scores(
            reward_B=score_lib.combine(self._rewards, by_name, failed),
            by_name=by_name,
            failed=failed,
            seconds=named(self._seconds),
            failures=tuple(order),
            metrics=self._metrics,
            extras=self._extras,
        )

    def progress(self) -> tuple[int, int]:
        """Rewards that are there, and those that were asked for."""
        total = len(self._rewards) * self._rows
        return (total if self._done.is_set() else total - self._open), total

    def _fill(self, reward: int, rows: range, answer: Answer) -> None:
        """The outcome of one call (of one completion, if it failed)."""
        self._seconds[reward, rows] = answer.seconds / len(rows)
        if answer.values is None:
            self._failed[reward, rows] = True
            name = self._rewards[reward].name
            self._failures += [Failure(name, r, answer.failure, answer.message) for r in rows]
        else:
            self._values[reward, rows] = answer.values
        for name, (total, count) in answer.metrics.items():
            before = self._metrics.get(name, (0.0, 0))
            self._metrics[name] = (before[0] + total, before[1] + count)
        for name, values in answer.extras.items():
            column = self._extras.setdefault(name, [None] * self._rows)
            column[rows.start : rows.stop] = values
        self._open -= len(rows)
        if not self._open:
            self._done.set()

    def _end(self, fault: str) -> None:
        self._fault = fault
        self._done.set()


@dataclasses.dataclass
class _Task:
    call: Call
    ticket: Ticket
    rows: range


class _Worker:
    """One process and its pipe; `task` is what it works on."""

    def __init__(self, setup: Setup):
        self.pipe, theirs = connection.Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from grpo_jax.rewards import worker; "
            f"worker.main({theirs.fileno()})"
        )
        alone = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # a program's own output stays clean
            # An accelerator belongs to the trainer; a worker's JAX, if any, runs on the CPU.
            env=alone | os.environ | {"JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C is not for it; its children die with it
        )
        theirs.close()
        self.task: _Task | None = None
        self.is_ready = False
        self.deadline = time.monotonic() + _START_LIMIT_S
        self.pipe.send(setup)

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    def kill(self) -> None:
        """The process and all that it started, at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.pipe.close()


class Pool:
    """Reward functions in `num_workers` processes. A context manager; its end kills them."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        max_completion_tokens: int = 0,
        num_workers: int = 1,
        limits: Limits = Limits(),
    ):
        """Starts the workers; they import the reward functions while the caller goes on.

        `max_completion_tokens`: the run's limit, which functions may ask for.
        """
        assert rewards and num_workers > 0
        self.rewards = list(rewards)
        self._limits = limits
        self._setup = Setup(
            tuple(r.spec for r in rewards),
            tuple(r.name for r in rewards),
            limits.memory_bytes,
            max_completion_tokens,
        )
        self._typical_s = [0.0] * len(rewards)  # of a completion, in calls that went well
        self._false_starts = 0
        self._queue: collections.deque[_Task] = collections.deque()
        self._lock = threading.Lock()
        self._closing = False
        self._ready = threading.Event()
        self._fault: str | None = None
        self._bell, self._ring = os.pipe()
        os.set_blocking(self._ring, False)
        # Started by the thread that waits for them: Linux ends a worker with its parent thread.
        self._workers: list[_Worker] = []
        self._thread = threading.Thread(
            target=self._serve, args=(num_workers,), name="rewards", daemon=True
        )
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """The rewards' names, in the config's order."""
        return [reward.name for reward in self.rewards]

    @property
    def accuracy(self) -> str | None:
        """The name of the reward that says what is right and wrong; None where none does."""
        return next((reward.name for reward in self.rewards if reward.gives_accuracy), None)

    def wait_ready(self) -> None:
        """Until the workers have imported their functions, or it is known that they cannot."""
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
        """Asks for the rewards of completions; row i of every list belongs to completion i.

        A function is called with `group` consecutive completions at once.
        """
        rows = len(completions)
        lengths = {"prompts": len(prompts)} | {n: len(values) for n, values in columns.items()}
        assert set(lengths.values()) == {rows}, f"{rows} completions, but {lengths}"
        ticket = Ticket(self.rewards, rows)
        state = trainer_state or {"global_step": 0, "max_steps": 0, "epoch": 0.0}
        tasks = []
        for start in range(0, rows, group):
            part = range(start, min(start + group, rows))
            pick = slice(part.start, part.stop)
            for i in range(len(self.rewards)):
                call = Call(
                    i,
                    prompts[pick],
                    completions[pick],
                    None if completion_ids is None else completion_ids[pick],
                    {name: values[pick] for name, values in columns.items()},
                    state,
                    None if rendered_prompts is None else rendered_prompts[pick],
                )
                tasks.append(_Task(call, ticket, part))
        with self._lock:
            assert not self._closing, "the pool is closed"
            if self._fault:
                ticket._end(self._fault)
            self._queue.extend(tasks)
        self._wake()
        return ticket

    def score(self, *args: Any, **kwargs: Any) -> Scores:
        """The rewards of completions, as `submit`, waited for."""
        return self.submit(*args, **kwargs).result()

    def close(self) -> None:
        """Ends the workers; what they were asked for is forgotten."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        self._thread.join()
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
        except BlockingIOError:  # it was told often enough
            pass

    def _serve(self, num_workers: int) -> None:
        try:
            self._workers = [_Worker(self._setup) for _ in range(num_workers)]
            while not self._closing:
                self._hand_out()
                self._wait()
        except BaseException as error:
            self._give_up(f"The reward workers failed: {type(error).__name__}: {error}")
            if not isinstance(error, RewardError):
                raise
        finally:
            for worker in self._workers:
                worker.kill()
            self._give_up("The reward workers were ended.")

    def _give_up(self, fault: str) -> None:
        with self._lock:
            self._fault = self._fault or fault
            tasks = [*self._queue, *(w.task for w in self._workers if w.task)]
            self._queue.clear()
        for task in tasks:
            task.ticket._end(self._fault)
        self._ready.set()

    def _hand_out(self) -> None:
        for i, worker in enumerate(self._workers):
            if not worker.is_idle:
                continue
            with self._lock:
                if not self._queue:
                    return
                task = self._queue.popleft()
            worker.task = task
            worker.deadline = time.monotonic() + self._limits.seconds
            if len(task.rows) > 1:  # slow by nature is not hanging: time for what such calls take
                worker.deadline += 4 * len(task.rows) * self._typical_s[task.call.reward]
            try:
                worker.pipe.send(task.call)
            except OSError:
                self._replace(i, "died")

    def _wait(self) -> None:
        """Until a worker answers, dies or is late, or there is something new to do."""
        busy = [w for w in self._workers if not w.is_idle]
        late = min((w.deadline for w in busy), default=None)
        timeout = None if late is None else max(late - time.monotonic(), 0.0)
        ready = connection.wait([self._bell, *(w.pipe for w in self._workers)], timeout)
        if self._bell in ready:
            os.read(self._bell, 4096)
        for i, worker in enumerate(list(self._workers)):
            if worker.pipe in ready:
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    self._replace(i, "died")
                    continue
                self._heard(worker, message)
            elif not worker.is_idle and time.monotonic() >= worker.deadline:
                self._replace(i, "timeout")

    def _heard(self, worker: _Worker, message: Any) -> None:
        if not worker.is_ready:
            if message is not None:
                raise RewardError(f"A reward worker could not start: {message}")
            worker.is_ready, self._false_starts = True, 0
            if all(w.is_ready for w in self._workers):
                self._ready.set()
            return
        task, worker.task = worker.task, None
        self._finish(task, message)

    def _finish(self, task: _Task, answer: Answer) -> None:
        if answer.values is None and len(task.rows) > 1:  # which of them was it?
            singles = [
                _Task(task.call.row(i), task.ticket, range(row, row + 1))
                for i, row in enumerate(task.rows)
            ]
            with self._lock:
                self._queue.extendleft(reversed(singles))
            return
        if answer.values is not None:
            i = task.call.reward
            mean_s = answer.seconds / len(task.rows)
            self._typical_s[i] = max(mean_s, 0.9 * self._typical_s[i])
        task.ticket._fill(task.call.reward, task.rows, answer)

    def _replace(self, i: int, kind: str) -> None:
        """A new worker in the place of one that died or is late; its task has failed."""
        worker = self._workers[i]
        task, status = worker.task, worker.process.poll()
        worker.kill()
        status = worker.process.returncode if status is None else status
        if not worker.is_ready:
            self._false_starts += 1
            if self._false_starts >= _MAX_FALSE_STARTS:
                what = f"ended with status {status}" if kind == "died" else "did not get ready"
                raise RewardError(
                    f"Reward workers {what} before they answered anything, {self._false_starts} "
                    "in a row. Try the reward functions with python -m grpo_jax.score, or raise "
                    "rewards.memory_gb."
                )
        self._workers[i] = _Worker(self._setup)
        if task is None:
            return
        name = self._setup.names[task.call.reward]
        if kind == "timeout":
            message = (
                f"The reward {name!r} took longer than rewards.time_limit_s = "
                f"{self._limits.seconds:g} s and was killed."
            )
        else:
            message = f"The process of the reward {name!r} ended with status {status}."
        self._finish(task, Answer(None, self._limits.seconds, kind, message))
