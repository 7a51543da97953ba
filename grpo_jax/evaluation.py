"""Problems answered by a policy: what is right, how the samples vote, every item on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax import disk, estimates, hosts
from grpo_jax.data.problems import Problem
from grpo_jax.estimates import Tally
from grpo_jax.metrics import say
from grpo_jax.phases import phase
from grpo_jax.policy import Policy
from grpo_jax.rewarding import RewardCollector
from grpo_jax.rewards import score as score_lib
from grpo_jax.rewards import votes as votes_lib
from grpo_jax.rewards.answers import extract_answer
from grpo_jax.rewards.completions import opens_thinking
from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.rewards.reward import Reward
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Array, Params, Rollouts
from grpo_jax.workdir import write_whole

_VOTING_LIMIT_S = 60.0  # for comparing the answers of one problem's samples


@dataclasses.dataclass(frozen=True)
class Questions:
    """Problems with their prompts as tokens and as the text those stand for."""

    problems: list[Problem]
    prompt_ids: list[list[int]]
    texts: list[str]

    def take(self, index) -> Questions:
        """Some of them, by number."""
        pick = lambda items: [items[i] for i in index]  # noqa: E731
        return Questions(pick(self.problems), pick(self.prompt_ids), pick(self.texts))


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
    scores: score_lib.Scores
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
    whenever a question has all its completions, on the process that collects its rewards; `on_harvest`
    whenever some completions have finished, on all alike.
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
    if reward is None or votes_lib.same_answer_of(reward.spec) is None:
        return None
    prompts = [text for text in questions.texts for _ in range(n)]
    return votes_lib.count_votes(reward, prompts, texts, prompts, n, Limits(_VOTING_LIMIT_S))


def greedy_tallies(answered: Answered, max_tokens: int) -> dict[str, Tally]:
    """Metrics of one greedy completion per problem, by name."""
    length_PG, stopped_PG = answered.length_PG, answered.stopped_PG
    found_PG = np.array([a is not None for a in answered.answers]).reshape(length_PG.shape)
    limit = float(max_tokens)
    tallies = {}
    if answered.correct_PG is not None:
        judged_P = answered.judged_PG.sum(axis=1)
        tallies["accuracy"] = estimates.ratio(answered.correct_PG.sum(axis=1), judged_P)
    tallies["reward"] = _mean(answered.scores.reward_B.reshape(length_PG.shape))
    for name, value_B in answered.scores.by_name.items():
        tallies[f"reward/{name}"] = _mean(value_B.reshape(length_PG.shape))
    return tallies | {
        "answer_found_share": estimates.mean(found_PG.mean(axis=1)),
        "truncated_share": estimates.mean(1 - stopped_PG.mean(axis=1)),
        "length": estimates.mean(length_PG.mean(axis=1), 1.0, limit),
        "stopped_length": estimates.ratio(
            (length_PG * stopped_PG).sum(axis=1), stopped_PG.sum(axis=1), 1.0, limit
        ),
    }


def _mean(value_PG: np.ndarray) -> Tally:
    """The mean of the known ones of some rewards; where all are equal, others lie in [0, 1]."""
    known_PG = ~np.isnan(value_PG)
    value_PG = np.where(known_PG, value_PG, 0.0).astype(np.float64)
    low, high = min(0.0, value_PG.min()), max(1.0, value_PG.max())
    return estimates.ratio(value_PG.sum(axis=1), known_PG.sum(axis=1), low, high)


def refuse_samples(rewards: Sequence[Reward], num_samples: int, option: str) -> None:
    """Raises ValueError where samples are asked for, and no reward tells which are right."""
    if num_samples and not any(reward.gives_accuracy for reward in rewards):
        raise ValueError(
            f"{option} = {num_samples} asks for pass@k and maj@k, and none of the rewards "
            f"({', '.join(reward.name for reward in rewards)}) is known to give 1 for right and 0 "
            f"for wrong. Name the one that does in rewards.accuracy, or set {option} to 0."
        )


def sampled_tallies(answered: Answered, ks: list[int]) -> dict[str, Tally]:
    """pass@k and maj@k of each k, and the mean accuracy, of several samples per problem.

    There is no maj@k where the reward reads no answer that could be voted for.
    A completion to which the reward does not apply counts as not right.
    """
    correct_PG, vote_PG = answered.correct_PG, answered.vote_PG
    n = correct_PG.shape[1]
    values = {f"pass@{k}": estimates.pass_at_k(correct_PG.sum(axis=1), n, k) for k in ks}
    if vote_PG is not None:
        values |= {f"maj@{k}": estimates.maj_at_k(vote_PG, correct_PG, k) for k in ks}
    values[f"mean@{n}"] = correct_PG.mean(axis=1)
    return {name: estimates.mean(value_P) for name, value_P in values.items()}


def run(
    engine: Engine,
    params: Params,
    policy: Policy,
    questions: Questions,
    pool: Pool,
    *,
    num_samples: int,
    temperature: float,
    key: Array,
    file: Path | None,
    on_harvest: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Metrics of the policy on the questions, by the names that a run logs.

    `num_samples` 0 is one greedy completion of each; more, pass@k, maj@k and the mean by sampling
    at `temperature`. Every item goes to `file` as one JSON object a line. `on_harvest` is called
    whenever some completions have finished.
    """
    answered = answer(
        engine,
        params,
        policy,
        questions,
        pool,
        num_samples=num_samples,
        temperature=temperature,
        key=key,
        on_harvest=on_harvest,
    )
    if file is not None and hosts.is_first():
        try:
            write_items(file, answered)
        except OSError as error:  # the numbers are there; a run does not end for the texts
            if not disk.is_full(error):
                raise
            say(f"warning: {file} cannot be written, the disk is full. It is left out.")
    if not num_samples:
        tallies = greedy_tallies(answered, int(answered.length_PG.max()))
        tallies.pop("stopped_length")  # undefined where none stopped
    else:
        tallies = sampled_tallies(answered, [num_samples])
    values = {f"eval/{name}": tally.value for name, tally in tallies.items()}
    values = {name: value for name, value in values.items() if not np.isnan(value)}
    if answered.scores.failures:
        values["eval/failed_rewards"] = float(len(answered.scores.failures))
    return values


def write_items(file: Path, answered: Answered, further: dict[str, np.ndarray] | None = None):
    """Writes every completion with what is known of it, one JSON object a line.

    `further`: more numbers, [B] each, by name.
    """
    questions, scores = answered.questions, answered.scores
    group = answered.length_PG.shape[1]
    lines = []
    for row, completion in enumerate(answered.completions):
        p, g = divmod(row, group)
        by_name = {n: float(v[row]) for n, v in scores.by_name.items()}
        item: dict[str, Any] = {
            "prompt": questions.texts[p],
            "columns": questions.problems[p].columns,
            "sample": g,
            "completion": completion,
            "rewards": {n: None if np.isnan(v) else v for n, v in by_name.items()},
            "answer": answered.answers[row],
            "length": int(answered.length_PG[p, g]),
            "stopped": bool(answered.stopped_PG[p, g]),
        }
        if answered.correct_PG is not None:
            item["correct"] = bool(answered.correct_PG[p, g])
        item |= {name: float(value_B[row]) for name, value_B in (further or {}).items()}
        lines.append(json.dumps(item, default=str))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join(lines) + "\n")
