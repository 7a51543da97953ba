"""Demonstrations within the groups of a step: completions, or parts of them, that are given.

`Demonstrations.of` tells what a draw's groups get besides what the policy draws. All follows from
the problems, the seed, and the numbers of step and draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.data import streams
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.rewards import scores as scores_lib
from grpo_jax.rewards.scores import Scores
from grpo_jax.sampling import layouts
from grpo_jax.structs import Rollouts, pad_rows

Add = Callable[[int, list[list[int]]], None]  # takes a prompt's number and its completions


class Nothing:
    """Nothing is given: the policy draws all."""

    def of(
        self, problem_P: Sequence[int], step: int, number: int, prompt_ids: list[list[int]]
    ) -> AsDrawn:
        """What the groups of a draw get; `problem_P`: numbers of their training problems."""
        return AsDrawn(prompt_ids)

    def drawn(self, sampled: Rollout, scores: Scores) -> tuple[Rollout, Scores]:
        """What the policy drew of a rollout, with its scores; lengths without given tokens."""
        return sampled, scores

    def metrics(self, sampled: Rollout, scores: Scores) -> dict[str, float]:
        """Metrics of what was given, by their logged names."""
        return {}


NOTHING = Nothing()


@dataclasses.dataclass(frozen=True)
class AsDrawn:
    """A draw whose completions are those of the engine."""

    prompt_ids: list[list[int]]  # that the engine continues

    def to(self, add: Add) -> Add:
        """`add` for the engine's completions: it gets those of the whole groups."""
        return add

    def joined(self, drawn: Rollouts) -> Rollouts:
        """The completions of the groups, from those of the engine."""
        return drawn


@dataclasses.dataclass(frozen=True)
class OneMore(AsDrawn):
    """A demonstration is one more completion of each group, the last."""

    given_P: list[list[int]]  # token ids; []: the problem has none

    def to(self, add: Add) -> Add:
        return lambda p, rows: add(p, [*rows, self.given_P[p] or [0]])

    def joined(self, drawn: Rollouts) -> Rollouts:
        """Where there is no demonstration stands a token that is not trained on."""
        limit = drawn.completion_PGC.shape[-1]
        given_PC, length_P = pad_rows([ids or [0] for ids in self.given_P], limit)
        has_P = np.array([bool(ids) for ids in self.given_P])
        more = lambda x_PG, x_P: np.concatenate([x_PG, x_P[:, None]], axis=1)  # noqa: E731
        length_PG = more(drawn.length_PG, length_P)
        within_PGC = np.arange(limit) < length_PG[..., None]
        given_PGC = within_PGC.copy()
        given_PGC[:, :-1] = False
        has_PG = more(np.ones_like(drawn.stopped_PG), has_P)
        return drawn.replace(
            completion_PGC=more(drawn.completion_PGC, given_PC),
            logp_PGC=more(drawn.logp_PGC, np.zeros(given_PC.shape, np.float32)),
            length_PG=length_PG,
            stopped_PG=more(drawn.stopped_PG, np.ones_like(has_P)),
            chosen_PGC=within_PGC & has_PG[..., None],
            given_PGC=given_PGC,
        )


@dataclasses.dataclass(frozen=True)
class Hints(AsDrawn):
    """The beginning of a demonstration begins each completion of its group.

    The engine continues prompt and hint. What goes beyond the limit of a completion is cut, and
    such a completion counts as truncated.
    """

    asked_ids: list[list[int]]  # the prompts without hints
    hint_P: list[list[int]]
    limit: int  # tokens of a completion

    def to(self, add: Add) -> Add:
        whole = lambda p, ids: (self.hint_P[p] + ids)[: self.limit]  # noqa: E731
        return lambda p, rows: add(p, [whole(p, ids) for ids in rows])

    def joined(self, drawn: Rollouts) -> Rollouts:
        num_P = np.array([len(hint) for hint in self.hint_P], np.int32)
        length_PG = drawn.length_PG + num_P[:, None]
        completion_PGC, logp_PGC = (
            np.zeros_like(x) for x in (drawn.completion_PGC, drawn.logp_PGC)
        )
        for p, (hint, n) in enumerate(zip(self.hint_P, num_P)):
            rest = self.limit - n
            completion_PGC[p, :, :n] = hint
            completion_PGC[p, :, n:] = drawn.completion_PGC[p, :, :rest]
            logp_PGC[p, :, n:] = drawn.logp_PGC[p, :, :rest]
        fits_PG = length_PG <= self.limit
        length_PG = np.minimum(length_PG, self.limit)
        within_PGC = np.arange(self.limit) < length_PG[..., None]
        longest = max(map(len, self.asked_ids))
        prompt_PQ, prompt_length_P = pad_rows(self.asked_ids, layouts.padded(longest))
        return drawn.replace(
            prompt_PQ=prompt_PQ,
            prompt_length_P=prompt_length_P,
            completion_PGC=np.where(within_PGC, completion_PGC, 0),
            logp_PGC=np.where(within_PGC, logp_PGC, np.float32(0)),
            length_PG=length_PG,
            stopped_PG=drawn.stopped_PG & fits_PG,
            given_PGC=within_PGC & (np.arange(self.limit) < num_P[:, None, None]),
        )


@dataclasses.dataclass(frozen=True)
class Demonstrations(Nothing):
    """Demonstrations of the training problems."""

    ids: Sequence[list[int]]  # of each problem, the stop token last; []: it has none
    seed: int
    limit: int  # tokens of a completion
    # Probability of each token to be in the hint, by step; None: they are whole completions.
    hint_share: Callable[[int], float] | None = None

    def of(self, problem_P, step, number, prompt_ids) -> AsDrawn:
        own = [self.ids[i] for i in problem_P]
        if self.hint_share is None:
            return OneMore(prompt_ids, own)
        rng = streams.stream(self.seed, "hints", number)
        # The stop token is never in a hint: the policy ends its completion.
        lengths = rng.binomial([max(len(ids) - 1, 0) for ids in own], self.hint_share(step))
        hints = [list(ids[:n]) for ids, n in zip(own, lengths)]
        begun = [asked + hint for asked, hint in zip(prompt_ids, hints)]
        return Hints(begun, prompt_ids, hints, self.limit)

    def drawn(self, sampled: Rollout, scores: Scores) -> tuple[Rollout, Scores]:
        whole = sampled.completions
        prompts, group, _ = whole.completion_PGC.shape
        group -= self.hint_share is None
        length_PG = whole.length_PG - whole.given_PGC.sum(axis=-1, dtype=np.int32)
        cut = lambda x: x[:, :group]  # noqa: E731
        completions = whole.replace(
            completion_PGC=cut(whole.completion_PGC),
            logp_PGC=cut(whole.logp_PGC),
            length_PG=cut(length_PG),
            stopped_PG=cut(whole.stopped_PG),
            chosen_PGC=None,
            given_PGC=None,
        )
        rows = np.arange(whole.length_PG.size).reshape(prompts, -1)[:, :group].ravel()
        of_drawn = scores_lib.select([(scores, rows)])
        return dataclasses.replace(sampled, completions=completions), of_drawn

    def metrics(self, sampled: Rollout, scores: Scores) -> dict[str, float]:
        given_PGC = sampled.completions.given_PGC
        if self.hint_share is not None:
            return {"hybrid/hint_tokens": float(given_PGC[:, 0].sum(axis=-1).mean())}
        reward_P = scores.reward_B.reshape(given_PGC.shape[:2])[:, -1]
        reward_P = reward_P[sampled.completions.chosen_PGC[:, -1, 0]]
        known = len(reward_P) and not np.isnan(reward_P).all()
        return {"hybrid/given_reward": float(np.nanmean(reward_P))} if known else {}
