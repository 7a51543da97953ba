"""Rewards of a rollout: a group is scored while other groups are still being sampled."""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grpo_jax.data.problems import Problem, as_reply
from grpo_jax.environments.episode import Episode
from grpo_jax.environments.live import INVALID
from grpo_jax.hosts import processes
from grpo_jax.messages.console import say
from grpo_jax.models.policy import Policy
from grpo_jax.rewards import ensembles, kinds
from grpo_jax.rewards import scores as scores_lib
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.scores import RewardError, Scores
from grpo_jax.rewards.ticket import Ticket

TURN_REWARDS = "environment:turn_rewards"  # the entry of `rewards.names` for their sum


class RewardCollector:
    """Collects the rewards of some problems' completions; each group is scored once it is finished.

    Give `add` to the engine as `on_group`, and read `scores` when it is done. Each process scores
    the groups of its engine, and all processes get all scores.
    """

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        problems: list[Problem],
        prompt_texts: list[str],
        group: int,
        trainer_state: dict[str, Any] | None = None,
    ):
        """`prompt_texts`: the problems' prompts as the model reads them, chat template included.

        `trainer_state`: the argument of that name of reward functions.
        """
        self._pool, self._policy, self._problems = pool, policy, problems
        self._prompt_texts = prompt_texts
        self._group, self._trainer_state = group, trainer_state
        self._numbers: Sequence[int] = range(len(problems))  # of those that count
        self._tickets: dict[int, Ticket] = {}
        self._texts: dict[int, list[str]] = {}
        self._episodes: dict[int, Sequence[Episode]] = {}
        # An evaluation has no advantages, and no state of a trainer.
        self._by_step = trainer_state is not None and any(r.by_step for r in pool.rewards)
        self._ids: dict[int, list[list[int]]] = {}  # with `_by_step`

    def add(
        self, number: int, completions: list[list[int]], episodes: Sequence[Episode] = ()
    ) -> None:
        """Submits the finished completions (token ids) of problem `number`.

        `episodes`: of which they are the tokens, if they are conversations with an environment.
        """
        problem = self._problems[number]
        texts = [self._policy.text(ids) for ids in completions]
        prompt, replies = problem.prompt, [as_reply(problem, text) for text in texts]
        if episodes:
            self._episodes[number] = episodes
            if not isinstance(prompt, str):
                texts = [self._policy.tokenizer.decode(ids) for ids in completions]  # with roles
                first = episodes[0]
                prompt, replies = first.messages[: first.first], [e.replies for e in episodes]
        self._texts[number] = texts
        if self._by_step:
            self._ids[number] = completions
        self._tickets[number] = self._pool.submit(
            [prompt] * len(texts),
            replies,
            {name: [value] * len(texts) for name, value in problem.columns.items()},
            completion_ids=completions,
            rendered_prompts=[self._prompt_texts[number]] * len(texts),
            group=self._group,
            trainer_state=self._trainer_state,
        )

    def keep(self, numbers: Sequence[int]) -> None:
        """From now on only these problems count, in this order: the others are not finished."""
        self._numbers = numbers

    def texts(self, numbers: Iterable[int] | None = None) -> list[str]:
        """The texts of the completions of some problems, in order; None: of all problems.

        Every process must call it.
        """
        chosen = range(len(self._numbers)) if numbers is None else numbers
        numbers = [self._numbers[n] for n in chosen]
        own = [(n, self._texts[n]) for n in numbers if n in self._texts]
        everyones = dict(pair for pairs in processes.gather(own, "the texts") for pair in pairs)
        return [text for n in numbers for text in everyones[n]]

    def scores(self) -> Scores:
        """All rewards, prompt by prompt. Raises RewardError when none can be computed.

        Every process must call it.
        """
        own, fault = {}, ""
        try:
            own = {n: self._with_episodes(n, t.result()) for n, t in self._tickets.items()}
            own = {n: self._in_tokens(n, s) if s.steps else s for n, s in own.items()}
        except RewardError as error:  # all must learn of it, or they would wait for this process
            fault = str(error)
        everyones = own
        if processes.count() > 1:
            told = [(n, scores.as_json()) for n, scores in own.items()]
            answers = processes.gather((fault, told), "the rewards")
            fault = next((text for text, _ in answers if text), "")
            everyones = {n: Scores.from_json(scores) for _, told in answers for n, scores in told}
        if fault:
            raise RewardError(fault)
        assert len(everyones) == len(self._numbers), "the engine did not finish every group"
        parts = [everyones[n] for n in self._numbers]
        known = [r for r in self._pool.rewards if r.name in parts[0].by_name]
        scores = scores_lib.join(parts, known)
        scores = self._with_models(scores) if self._pool.models else scores
        return ensembles.add(scores, self._pool.rewards)

    def _with_episodes(self, number: int, scores: Scores) -> Scores:
        """The scores of a problem's completions with those that their environments gave."""
        if not (episodes := self._episodes.get(number)):
            return scores
        for reward in (r for r in self._pool.rewards if r.runs == kinds.EPISODES):
            answers = [e.scored.get(reward.name) for e in episodes]
            if reward.takes_environments:
                scores = scores_lib.with_answers(scores, self._pool.rewards, reward.name, answers)
            else:
                in_turns = reward.spec == TURN_REWARDS
                value_B = [sum(e.turn_rewards) if in_turns else e.reward for e in episodes]
                scores = scores_lib.with_values(scores, self._pool.rewards, reward.name, value_B)
        why = {
            row: f"The episode ended as {e.outcome}, through no fault of the policy: {e.fault}"
            for row, e in enumerate(episodes)
            if e.outcome in INVALID
        }
        return scores_lib.left_out(scores, "environment", why) if why else scores

    def _in_tokens(self, number: int, scores: Scores) -> Scores:
        """The scores with the ends of steps in tokens; without steps if nobody reads them."""
        if not self._by_step:
            return dataclasses.replace(scores, steps={})

        def of(row: int, pairs: list | None) -> list | None:
            if pairs is None:
                return None
            ends = [end for end, _ in pairs]
            tokens = tokens_up_to(self._ids[number][row], ends, self._policy.text)
            return [[n, value] for n, (_, value) in zip(tokens, pairs)]

        steps = {name: [of(*one) for one in enumerate(rows)] for name, rows in scores.steps.items()}
        return dataclasses.replace(scores, steps=steps)

    def _with_models(self, scores: Scores) -> Scores:
        """The scores with those of reward models. Every process must call it."""
        began = time.monotonic()
        problems = [self._problems[n] for n in self._numbers]
        by_model = self._pool.models(problems, self.texts(), self._group)
        seconds = time.monotonic() - began
        return scores_lib.with_models(scores, self._pool.measured, by_model, seconds)


def tokens_up_to(
    ids: Sequence[int], ends: Sequence[int], text_of: Callable[[Sequence[int]], str]
) -> list[int]:
    """With how many tokens a text is whole up to each of some ends, in characters, which rise.

    `text_of`: the text of ids. A character of which a token has a part ends with its last token.
    """
    found, first = [], 0
    whole = lambda n: len(text_of(ids[:n]).rstrip("\ufffd"))  # noqa: E731
    for end in ends:
        first = bisect.bisect_left(range(len(ids)), end, lo=first, key=whole)
        found.append(first)
    return found


class SelectedRewards:
    """The rewards of some groups of several collectors, which have all been scored."""

    def __init__(self, groups: list[tuple[RewardCollector, int]], scores: Scores):
        """`groups`: of each group its collector, and its problem's number there."""
        self._groups, self._scores = groups, scores

    def texts(self, numbers: Iterable[int]) -> list[str]:
        """The texts of the completions of some groups, in order. Every process must call it."""
        chosen = (self._groups[number] for number in numbers)
        return [text for collector, number in chosen for text in collector.texts([number])]

    def scores(self) -> Scores:
        """All rewards, group by group."""
        return self._scores


class FailureReports:
    """Warns of failed rewards: of each reward function, the 1st, 2nd, 4th, 8th ... time."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def tell(self, when: str, scores: Scores) -> None:
        """Prints the failures in `scores`: one line per reward, with an example."""
        for name, failed_B in scores.failed.items():
            retried, why = scores.retried.get(name, (0, ""))
            if not failed_B.any() and not retried:
                continue
            times = self._times[name] = self._times.get(name, 0) + 1
            if times & (times - 1):
                continue
            if failed_B.any():
                first = next(f for f in scores.failures if f.reward == name)
                counts = "get the least value that it gave in the step"
                if (failed_B & scores.unknown_B).any():
                    counts = "are left out as unknown"
                say(
                    f"warning: {when}: {failed_B.sum()} of {len(failed_B)} completions have no "
                    f"reward {name!r}, and {counts} (rewards.on_failure). {first.message}"
                )
            else:
                say(
                    f"warning: {when}: {retried} calls of the reward {name!r} failed for a group. "
                    "Called for each completion alone, they succeeded, and these rewards count. "
                    f"{why}"
                )
