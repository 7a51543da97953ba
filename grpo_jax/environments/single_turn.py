"""Problems answered: completions of each, and what they earned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from grpo_jax.devices.phases import phase
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.rewarding import RewardCollector
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
class Rollout:
    """The completions of one step, on the host, and what collects their rewards."""

    questions: Questions
    rewards: RewardCollector
    completions: Rollouts
    seconds: float  # that sampling took


@dataclasses.dataclass(frozen=True)
class Answered:
    """G completions of each of P questions, prompt by prompt, and what they earned."""

    questions: Questions
    completions: list[str]
    scores: Scores
    answers: list[str | None]  # as extracted; None where there is none
    correct_PG: np.ndarray | None  # bool: right, as `Pool.accuracy` has it; None: no reward says so
    judged_PG: np.ndarray | None  # bool: completions to which that reward applies
    vote_PG: np.ndarray | None  # int64: of samples, see `count_votes`; None: no answers to compare
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
    on_answer: Callable[[], None] = lambda: None,
    on_harvest: Callable[[], None] = lambda: None,
) -> Answered:
    """`num_samples` completions of every question with their rewards; 0: a greedy one.

    `params` come from `engine.publish`; `temperature` is that of samples. `on_answer` is called
    whenever a question has all its completions, on the process that collects its rewards;
    `on_harvest` whenever some completions have finished, on all alike.
    """
    collector = RewardCollector(pool, policy, questions.problems, questions.texts, num_samples or 1)

    def take(number: int, completions: list[list[int]]) -> None:
        collector.add(number, completions)
        on_answer()

    with phase("evaluation"):
        rollouts = engine.generate(
            params,
            questions.prompt_ids,
            group=num_samples or 1,
            key=key,
            temperature=temperature if num_samples else 0.0,
            on_group=take,
            on_harvest=on_harvest,
        )
    scores, texts = collector.scores(), collector.texts()
    shape, verdict = rollouts.length_PG.shape, pool.accuracy
    open_B = np.repeat([opens_thinking(text) for text in questions.texts], shape[1])
    return Answered(
        questions=questions,
        completions=texts,
        scores=scores,
        answers=[extract_answer(t, thinking) for t, thinking in zip(texts, open_B)],
        correct_PG=None if verdict is None else scores.correct(verdict).reshape(shape),
        judged_PG=None if verdict is None else scores.judged(verdict).reshape(shape),
        vote_PG=_votes(pool, questions, texts, num_samples) if num_samples else None,
        length_PG=rollouts.length_PG,
        stopped_PG=rollouts.stopped_PG,
    )


def _votes(pool: Pool, questions: Questions, texts: list[str], n: int) -> np.ndarray | None:
    """The votes of all samples, equal as the reward that says what is right has it; int64 [P, G].

    None where there is no such reward, or it reads no answer.
    """
    reward = next((reward for reward in pool.rewards if reward.gives_accuracy), None)
    if reward is None or votes.same_answer_of(reward.spec) is None:
        return None
    prompts = [text for text in questions.texts for _ in range(n)]
    return votes.count_votes(reward, prompts, texts, prompts, n, Limits(_VOTING_LIMIT_S))
