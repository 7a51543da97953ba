"""Rewards of a rollout, begun while the rest of it is still being sampled."""

from __future__ import annotations

from typing import Any

from grpo_jax.data.problems import Problem
from grpo_jax.metrics import say
from grpo_jax.policy import Policy
from grpo_jax.rewards import score as score_lib
from grpo_jax.rewards.pool import Pool, Ticket


class Judge:
    """Has the completions of some problems scored, each group as soon as it is finished.

    Give `add` to the engine as `on_group`, and read `scores` when it is done.
    """

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        problems: list[Problem],
        group: int,
        trainer_state: dict[str, Any] | None = None,
    ):
        """`trainer_state`: what reward functions see of the run under that name."""
        self._pool, self._policy, self._problems = pool, policy, problems
        self._group, self._trainer_state = group, trainer_state
        self._tickets: list[Ticket | None] = [None] * len(problems)
        self._texts: list[list[str]] = [[]] * len(problems)

    def add(self, number: int, completions: list[list[int]]) -> None:
        """Submits the finished completions (token ids) of problem `number`."""
        problem = self._problems[number]
        texts = [self._policy.text(ids) for ids in completions]
        self._texts[number] = texts
        self._tickets[number] = self._pool.submit(
            [problem.prompt] * len(texts),
            [as_reply(problem, text) for text in texts],
            {name: [value] * len(texts) for name, value in problem.columns.items()},
            completion_ids=completions,
            group=self._group,
            trainer_state=self._trainer_state,
        )

    @property
    def texts(self) -> list[str]:
        """The completions as text, prompt by prompt."""
        return [text for group in self._texts for text in group]

    def scores(self) -> score_lib.Scores:
        """All rewards, prompt by prompt. Raises RewardError when none can be computed."""
        assert None not in self._tickets, "the engine did not finish every group"
        return score_lib.join([ticket.result() for ticket in self._tickets])


def as_reply(problem: Problem, text: str) -> Any:
    """A completion as reward functions get it: chat messages where the prompt is, else the text."""
    return text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]


class Complaints:
    """Tells the terminal of rewards that fail: of each reward, the 1st, 2nd, 4th, 8th ... time."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def note(self, when: str, scores: score_lib.Scores) -> None:
        """Says what failed in `scores`, in one line per reward, with an example."""
        for name, failed_B in scores.failed.items():
            if not failed_B.any():
                continue
            times = self._times[name] = self._times.get(name, 0) + 1
            if times & (times - 1) == 0:
                first = next(f for f in scores.failures if f.reward == name)
                say(
                    f"warning: {when}: {failed_B.sum()} of {len(failed_B)} completions have no "
                    f"reward {name!r} and count as 0 there. {first.message}"
                )
