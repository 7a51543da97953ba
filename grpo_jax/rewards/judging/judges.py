"""The judges among a run's rewards: one thread with an event loop, beside the reward workers.

A judgement waits for a server, for seconds. It does not belong into a worker that computes, and
whose time is limited as a whole. Here hundreds of them wait at once, while the device samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping

from grpo_jax.messages.credentials import hide, redact
from grpo_jax.rewards.completions import begin_in_thinking, text_of
from grpo_jax.rewards.judging.cache import Cache
from grpo_jax.rewards.judging.client import Budget, Limits, Server
from grpo_jax.rewards.judging.judge import Judge, Judged, joined
from grpo_jax.rewards.judging.rubric import Rubric
from grpo_jax.rewards.worker import Answer, Call

_KIND = {"timeout": "timeout", "verdict": "values", "garbage": "values"}  # as `scores.FAILURES`


@dataclasses.dataclass(frozen=True)
class Settings:
    """One judge as a config has it; the key comes from the environment, and stays in memory."""

    rubric: Rubric
    base_url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)

    def hidden(self, text: str) -> str:
        """A text without the key, and without what looks like one."""
        return redact(hide(text, self.key) if self.key else text)


class Judges:
    """Judges of a process by the names of their rewards. `close` ends all calls."""

    def __init__(
        self,
        settings: Mapping[str, Settings],
        limits: Limits = Limits(),  # noqa: B008
        cache: Cache | None = None,
    ):
        """Starts nothing yet. ValueError for an address that is none."""
        self._cache = Cache() if cache is None else cache
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task] = set()
        budget = Budget(limits, self._cache.calls, self._cache.tokens)
        slots = asyncio.Semaphore(limits.concurrency)
        self._servers, self._judges = [], {}
        for name, of in settings.items():
            how = limits, budget, slots, of.hidden
            try:
                server = Server(of.base_url, of.model, of.key, *how)
            except ValueError as error:
                raise ValueError(
                    f"judge.base_url: the address of the judge {name!r} {error}. Write one such as "
                    "http://localhost:8000/v1."
                ) from None
            self._servers.append(server)
            self._judges[name] = Judge(name, of.rubric, server, self._cache, limits.deadline_s)

    @property
    def names(self) -> list[str]:
        return list(self._judges)

    def submit(self, name: str, call: Call, done: Callable[[Answer], None]) -> None:
        """Has a judge judge the completions of a call; `done` gets the outcome, in another thread.

        It is called in any case: by the deadline of a judgement at the latest.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="judges", daemon=True)
            self._thread.start()
        self._loop.call_soon_threadsafe(self._begin, name, call, done)

    def close(self) -> None:
        """Ends the thread; open judgements are dropped, without a call of `done`."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._thread = None
        if not self._loop.is_closed():
            self._loop.close()

    # --- In the thread ---

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda loop, context: None)  # of closed connections
        self._loop.run_forever()
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        for server in self._servers:
            server.close()
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(asyncio.sleep(0))  # connections close

    def _begin(self, name: str, call: Call, done: Callable[[Answer], None]) -> None:
        task = self._loop.create_task(self._answer(name, call, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, name: str, call: Call, done: Callable[[Answer], None]) -> None:
        began = time.monotonic()
        try:
            found = await asyncio.gather(*(self._group(name, call, rows) for rows in _groups(call)))
            answer = as_answer(name, joined(found), time.monotonic() - began)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a fault of ours, or a column that no text can be made of
            why = f"The judge {name!r} failed: {type(error).__name__}: {redact(str(error))[:300]}"
            answer = Answer(None, time.monotonic() - began, "error", why)
        done(answer)

    async def _group(self, name: str, call: Call, rows: slice) -> Judged:
        texts = [text_of(completion) for completion in call.completions[rows]]
        columns = {n: values[rows.start] for n, values in call.columns.items()}
        rendered = None if call.rendered_prompts is None else call.rendered_prompts[rows]
        begun = begin_in_thinking(call.prompts[rows], rendered)
        return await self._judges[name].group(call.prompts[rows.start], columns, texts, begun)


def _groups(call: Call) -> list[slice]:
    """The rows of each prompt, one after the other; a trial's call has rows of several."""
    starts = [0]
    for i in range(1, len(call.completions)):
        if call.prompts[i] != call.prompts[i - 1] or not _alike(call, i):
            starts.append(i)
    return [slice(*pair) for pair in zip(starts, [*starts[1:], len(call.completions)])]


def _alike(call: Call, i: int) -> bool:
    """Whether row i has the columns of the row before it."""
    try:
        return all(v[i] is v[i - 1] or bool(v[i] == v[i - 1]) for v in call.columns.values())
    except ValueError:  # arrays
        return False


def as_answer(name: str, found: Judged, seconds: float) -> Answer:
    """A group's judgements as the answer of a reward function, with their metrics."""
    counts, spent = found.counts, found.counts.spent
    sums = {
        "judge/calls": spent.calls,
        "judge/retries": spent.retries,
        "judge/prompt_tokens": spent.prompt_tokens,
        "judge/completion_tokens": spent.completion_tokens,
        **{f"judge/failed_by_{kind}": n for kind, n in counts.failed.items()},
    }
    metrics = {f"{name}.{n}": pair for n, pair in found.by_criterion.items() if pair[1]}
    if counts.judgements:
        metrics["judge/cached_share"] = (float(counts.cached), counts.judgements)
    if spent.calls:
        metrics["judge/seconds"] = (spent.seconds, spent.calls)
    if counts.pairs:
        metrics[f"judge/flip_share/{name}"] = (float(counts.flips), counts.pairs)
    said = found.said_G
    return Answer(
        [float(value) for value in found.value_G],
        seconds,
        faults={i: f"The judge {name!r}: {message}." for i, (_, message) in found.faults.items()},
        kinds={i: _KIND.get(kind, "error") for i, (kind, _) in found.faults.items()},
        metrics=metrics,
        sums={n: float(total) for n, total in sums.items()},
        extras={f"{name} said": said} if any(said) else {},
    )
