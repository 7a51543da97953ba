"""One judge: a rubric and a server. It gives each completion of a group a number."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.completions import after_thinking
from grpo_jax.rewards.judging import messages, verdicts
from grpo_jax.rewards.judging.cache import Cache, Kept, key_of
from grpo_jax.rewards.judging.client import FailedError, Server, Spent
from grpo_jax.rewards.judging.rubric import Rubric

_SAID = 300  # characters of the end of a judge's text that are kept


@dataclasses.dataclass
class Counts:
    """What the judgements of a group took, and how they ended."""

    judgements: int = 0
    cached: int = 0
    spent: Spent = dataclasses.field(default_factory=Spent)
    failed: dict[str, int] = dataclasses.field(default_factory=dict)  # by kind
    flips: int = 0
    pairs: int = 0  # that were judged in both orders

    def add(self, other: Counts) -> None:
        for name in ("judgements", "cached", "flips", "pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.spent.add(other.spent)
        for kind, number in other.failed.items():
            self.failed[kind] = self.failed.get(kind, 0) + number


@dataclasses.dataclass(frozen=True)
class Judged:
    """A group's numbers; NaN where there is none, and for failures why."""

    value_G: np.ndarray
    faults: dict[int, tuple[str, str]]  # kind and message, by completion
    said_G: list[str | None]  # the end of what the judge wrote of a completion
    counts: Counts
    by_criterion: dict[str, tuple[float, int]]  # sums of the values, and their number


def joined(groups: Sequence[Judged]) -> Judged:
    """Several groups as one, in order."""
    if len(groups) == 1:
        return groups[0]
    faults, start, counts, sums = {}, 0, Counts(), {}
    for one in groups:
        faults |= {start + i: fault for i, fault in one.faults.items()}
        start += len(one.value_G)
        counts.add(one.counts)
        for name, (total, number) in one.by_criterion.items():
            before = sums.get(name, (0.0, 0))
            sums[name] = (before[0] + total, before[1] + number)
    value_G = np.concatenate([one.value_G for one in groups])
    return Judged(value_G, faults, [x for one in groups for x in one.said_G], counts, sums)


class Judge:
    """Judges groups of completions; all is called in one event loop."""

    def __init__(self, name: str, rubric: Rubric, server: Server, cache: Cache, deadline_s: float):
        """`deadline_s`: for each judgement, from the moment at which its group is given."""
        self.name, self.rubric = name, rubric
        self._server, self._cache, self._deadline_s = server, cache, deadline_s
        self._open: dict[str, asyncio.Future[Kept]] = {}  # calls under way, by key

    async def group(
        self,
        prompt: Any,
        columns: Mapping[str, Any],
        texts: Sequence[str],
        in_thinking: Sequence[bool],
    ) -> Judged:
        """The numbers of a prompt's completions. It raises nothing, and ends by the deadline.

        `in_thinking`: whether a completion begins inside of thinking.
        """
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        if not self.rubric.sees_thinking:  # of thinking that does not end, nothing is left
            pairs = zip(texts, in_thinking)
            texts = [(after_thinking(text, begun) or "").strip() for text, begun in pairs]
        work = _Work(self, prompt, columns, list(texts), deadline)
        if self.rubric.mode == "single":
            return await work.single()
        if self.rubric.against == "reference":
            return await work.against_reference()
        return await (work.pairwise() if self.rubric.mode == "pairwise" else work.listwise())

    async def verdict(self, request: messages.Request, deadline: float, counts: Counts) -> Kept:
        """The verdict of a call: kept, under way, or asked for. Raises FailedError."""
        counts.judgements += 1
        sampling = dict(self.rubric.sampling)
        digest, model = self.rubric.digest, self._server.model
        key = key_of(model, digest, sampling, request.messages)
        if (kept := self._cache.get(key)) is not None:
            counts.cached += 1
            return kept
        if (underway := self._open.get(key)) is not None:
            counts.cached += 1
            return await asyncio.shield(underway)
        underway = self._open[key] = asyncio.get_running_loop().create_future()
        try:
            kept = await self._asked(request, sampling, deadline, counts)
            self._cache.put(key, kept)
            underway.set_result(kept)
            return kept
        except FailedError as error:
            underway.set_exception(error)
            counts.failed[error.kind] = counts.failed.get(error.kind, 0) + 1
            raise
        finally:
            del self._open[key]
            if not underway.done():  # cancelled, or a fault of ours
                underway.set_exception(FailedError("timeout", "the judgement was given up"))
            underway.exception()  # if nobody waits for it

    async def _asked(
        self, request: messages.Request, sampling: dict, deadline: float, counts: Counts
    ) -> Kept:
        spent = Spent()
        try:
            async with asyncio.timeout_at(deadline):
                text = await self._server.ask(request.messages, sampling, spent)
        except TimeoutError:
            message = f"no verdict after judge.deadline_s = {self._deadline_s:g} s"
            raise FailedError("timeout", message) from None
        finally:
            counts.spent.add(spent)
        try:
            verdict = verdicts.parse(self.rubric, request, text)
        except verdicts.NoVerdictError as error:
            raise FailedError("verdict", str(error)) from None
        return Kept(verdict, text.strip()[-_SAID:], spent.prompt_tokens, spent.completion_tokens)


class _Work:
    """One group under judgement."""

    def __init__(
        self, judge: Judge, prompt: Any, columns: Mapping, texts: list[str], deadline: float
    ):
        self._judge, self._rubric = judge, judge.rubric
        self._prompt, self._columns, self._texts = prompt, columns, texts
        self._deadline, self._counts = deadline, Counts()

    async def _ask(self, answers: Sequence[str]) -> Kept | FailedError:
        request = messages.request(self._rubric, self._prompt, self._columns, answers)
        try:
            return await self._judge.verdict(request, self._deadline, self._counts)
        except FailedError as error:
            return error

    async def _all(self, calls: Sequence[Sequence[str]]) -> list[Kept | FailedError]:
        return list(await asyncio.gather(*(self._ask(answers) for answers in calls)))

    def _judged(
        self,
        value_G: np.ndarray,
        faults: dict[int, tuple[str, str]],
        said_G: list[str | None],
        by_criterion: dict[str, tuple[float, int]] | None = None,
    ) -> Judged:
        value_G = value_G.astype(np.float32)
        return Judged(value_G, faults, said_G, self._counts, by_criterion or {})

    async def single(self) -> Judged:
        found = await self._all([[text] for text in self._texts])
        criteria = [criterion.name for criterion in self._rubric.criteria]
        value_G = np.full(len(found), np.nan)
        sums = dict.fromkeys(criteria, (0.0, 0))
        for i, kept in enumerate(found):
            if isinstance(kept, FailedError):
                continue
            values = dict(zip(criteria, kept.verdict))
            value_G[i] = self._rubric.score(values)
            sums = {n: (sums[n][0] + v, sums[n][1] + 1) for n, v in values.items()}
        return self._judged(value_G, _faults(found), _said(found), sums)

    async def against_reference(self) -> Judged:
        """Each answer and the reference, in both orders: from -1 to 1."""
        reference = messages.as_text(self._columns[self._rubric.reference])
        group = len(self._texts)
        calls = [[text, reference] for text in self._texts]
        found = await self._all(calls + [call[::-1] for call in calls])
        value_G, faults = np.full(group, np.nan), {}
        for i in range(group):
            win = self._win(self._texts[i], reference, found[i], found[group + i])
            if isinstance(win, FailedError):
                faults[i] = (win.kind, str(win))
            else:
                value_G[i] = 2 * win - 1
        return self._judged(value_G, faults, _said(found[:group]))

    def _win(
        self, text: str, other: str, first: Kept | FailedError, second: Kept | FailedError
    ) -> float | FailedError:
        """How often a text wins, from both orders; a failure if one of them failed."""
        if text == other:
            return 0.5
        for kept in (first, second):
            if isinstance(kept, FailedError):
                return kept
        first_GG = verdicts.wins(first.verdict)
        second_GG = verdicts.wins(second.verdict[::-1])
        wins_GG, flips, _ = verdicts.both_orders(first_GG, second_GG)
        self._counts.flips += flips
        self._counts.pairs += 1
        return float(wins_GG[0, 1])

    async def pairwise(self) -> Judged:
        """Each answer and others of its group, in both orders: Borda's count, from -1 to 1."""
        group = len(self._texts)
        wins_GG, pairs = _wanted(group, self._rubric.opponents)
        asked = [(i, j) for i, j in pairs if self._texts[i] != self._texts[j]]
        calls = [[self._texts[i], self._texts[j]] for i, j in asked]
        found = await self._all(calls + [call[::-1] for call in calls])
        orders = dict(zip(asked, zip(found[: len(asked)], found[len(asked) :])))
        last: dict[int, FailedError] = {}
        for i, j in pairs:
            of = orders.get((i, j), (None, None))  # equal texts tie without a call
            win = self._win(self._texts[i], self._texts[j], *of)
            if isinstance(win, FailedError):
                last[i] = last[j] = win
                win = np.nan
            wins_GG[i, j], wins_GG[j, i] = win, 1 - win
        value_G = verdicts.borda(wins_GG)
        faults = {
            i: (last[i].kind, f"fewer than half of its comparisons are known; {last[i]}")
            for i in np.flatnonzero(np.isnan(value_G))
            if i in last
        }
        return self._judged(value_G, faults, [None] * group)

    async def listwise(self) -> Judged:
        """All answers at once, in both orders: Borda's count, from -1 to 1."""
        group = len(self._texts)
        if group == 1:
            return self._judged(np.full(1, np.nan), {}, [None])
        found = await self._all([self._texts, self._texts[::-1]])
        failed = next((x for x in found if isinstance(x, FailedError)), None)
        if failed is not None:
            faults = dict.fromkeys(range(group), (failed.kind, str(failed)))
            return self._judged(np.full(group, np.nan), faults, [None] * group)
        first_GG = verdicts.wins(found[0].verdict)
        second_GG = verdicts.wins(found[1].verdict[::-1])
        wins_GG, flips, pairs = verdicts.both_orders(first_GG, second_GG)
        self._counts.flips += flips
        self._counts.pairs += pairs
        return self._judged(verdicts.borda(wins_GG), {}, [found[0].said] * group)


def _wanted(group: int, opponents: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The pairs of a group that are compared, and the matrix that their outcomes fill, [G, G].

    With `opponents`, each answer meets the next ones around a ring.
    """
    reach = group - 1 if not opponents else min(opponents, group - 1)
    pairs = {tuple(sorted((i, (i + k) % group))) for i in range(group) for k in range(1, reach + 1)}
    wins_GG = np.full((group, group), np.inf)
    for i, j in pairs:
        wins_GG[i, j] = wins_GG[j, i] = np.nan
    return wins_GG, sorted(pairs)


def _faults(found: Sequence[Kept | FailedError]) -> dict[int, tuple[str, str]]:
    return {i: (x.kind, str(x)) for i, x in enumerate(found) if isinstance(x, FailedError)}


def _said(found: Sequence[Kept | FailedError]) -> list[str | None]:
    return [None if isinstance(x, FailedError) else x.said for x in found]
