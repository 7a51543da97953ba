"""Completions of questions with their rewards: those of a step, and those of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.devices.phases import phase
from grpo_jax.environments.drawing import ONE_TURN, OneTurn
from grpo_jax.environments.episode import Told
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.rewarding import RewardCollector, SelectedRewards
from grpo_jax.models.policy import Policy
from grpo_jax.rewards import votes
from grpo_jax.rewards.answers import extract_answer
from grpo_jax.rewards.completions import opens_thinking
from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.rewards.scores import Scores
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Array, Params, Rollouts

_VOTING_LIMIT_S = 60.0  # for comparing the answers of one problem's samples


@dataclasses.dataclass(frozen=True)
class Draws:
    """All N groups that a step drew until its batch was full; it learns from some of them."""

    number: int  # of draws
    problem_N: np.ndarray  # int64: numbers of the training problems
    prompt_length_N: np.ndarray  # int32: tokens
    length_NG: np.ndarray  # int32: tokens, stop token included
    stopped_NG: np.ndarray  # bool: ended by a stop token
    scores: Scores  # of N * G completions
    num_equal: int  # groups without a gradient


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The completions of one step, on the host, and the collector of their rewards."""

    questions: Questions
    rewards: RewardCollector | SelectedRewards
    completions: Rollouts
    seconds: float  # time of sampling
    greedy: RewardCollector | None = None  # of a greedy completion of each; None: none was sampled
    problem_P: Sequence[int] = ()  # numbers of the training problems
    draws: Draws | None = None  # None: one draw, whose groups are all here
    told: tuple[Told, ...] = ()  # of the episodes of each draw; (): there are no environments


@dataclasses.dataclass(frozen=True)
class Answered:
    """G completions of each of P questions, prompt by prompt, and their rewards."""

    questions: Questions
    completions: list[str]
    scores: Scores
    answers: list[str | None]  # extracted from the completions; None if there is none
    correct_PG: np.ndarray | None  # bool: right, by the reward `Pool.accuracy`; None without one
    judged_PG: np.ndarray | None  # bool: completions to which that reward applies
    vote_PG: np.ndarray | None  # int64: see `count_votes`; None: greedy, or no answers to compare
    length_PG: np.ndarray  # int32: tokens, stop token included
    stopped_PG: np.ndarray  # bool: ended by a stop token


def answer(
    engine: Engine,
    params: Params,
    policy: Policy,
    questions: Questions,
    pool: Pool,
    *,
    num_samples: int,
    temperature: float,
    key: Array,
    drawing: OneTurn = ONE_TURN,
    on_answer: Callable[[], None] = lambda: None,
    on_harvest: Callable[[], None] = lambda: None,
) -> Answered:
    """Samples `num_samples` completions of every question, with rewards; 0: one greedy completion.

    `params` come from `engine.publish`; `temperature` is for samples. `on_answer` is called once
    for each question, when all its completions are finished, on the process that collects its
    rewards. `drawing`: how completions are drawn. `on_harvest` is called on all processes whenever
    some completions have finished.
    """
    collector = RewardCollector(pool, policy, questions.problems, questions.texts, num_samples or 1)

    def take(number: int, *finished: Any) -> None:
        collector.add(number, *finished)
        on_answer()

    drawn = []
    with phase("evaluation"):
        for n, part in enumerate(drawing.parts(len(questions.problems), num_samples or 1)):
            asked = questions.take(part)
            rollouts, _ = drawing.draw(
                engine,
                params,
                asked,
                asked.prompt_ids,
                lambda number, *finished, first=part[0]: take(first + number, *finished),
                group=num_samples or 1,
                key=jax.random.fold_in(key, n) if n else key,
                temperature=temperature if num_samples else 0.0,
                numbers=part,
                draw=n,
                held_out=True,
                on_harvest=on_harvest,
            )
            drawn.append((rollouts.num_trained_PG, rollouts.stopped_PG))
    length_PG, stopped_PG = map(np.concatenate, zip(*drawn))
    scores, texts = collector.scores(), collector.texts()
    shape, verdict = length_PG.shape, pool.accuracy
    open_B = np.repeat([opens_thinking(text) for text in questions.texts], shape[1])
    return Answered(
        questions=questions,
        completions=texts,
        scores=scores,
        answers=[extract_answer(t, thinking) for t, thinking in zip(texts, open_B)],
        correct_PG=None if verdict is None else scores.correct(verdict).reshape(shape),
        judged_PG=None if verdict is None else scores.judged(verdict).reshape(shape),
        vote_PG=_votes(pool, questions, texts, num_samples) if num_samples else None,
        length_PG=length_PG,
        stopped_PG=stopped_PG,
    )


def _votes(pool: Pool, questions: Questions, texts: list[str], n: int) -> np.ndarray | None:
    """The votes of all samples; the accuracy reward decides which answers are equal; int64 [P, G].

    None if there is no such reward, or if it does not compare answers.
    """
    reward = next((reward for reward in pool.rewards if reward.gives_accuracy), None)
    if reward is None or votes.same_answer_of(reward.spec) is None:
        return None
    prompts = [text for text in questions.texts for _ in range(n)]
    return votes.count_votes(reward, prompts, texts, prompts, n, Limits(_VOTING_LIMIT_S))
