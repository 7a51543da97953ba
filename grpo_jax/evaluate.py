"""Held-out problems answered by a policy: accuracy, pass@k, maj@k, every item on disk."""

from __future__ import annotations

import collections
import dataclasses
import json
from math import comb
from pathlib import Path

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.policy import Policy
from grpo_jax.rewards import score as score_lib
from grpo_jax.rewards.answers import extract_answer
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Array, Params, Rollouts
from grpo_jax.workdir import write_whole


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


def completion_texts(policy: Policy, rollouts: Rollouts) -> list[str]:
    """The completions as text, prompt by prompt."""
    length_B = rollouts.length_PG.reshape(-1)
    ids_BC = rollouts.completion_PGC.reshape(len(length_B), -1)
    return [policy.text(ids[:n]) for ids, n in zip(ids_BC, length_B)]


def rewards_of(
    rewards: list[score_lib.Reward], questions: Questions, completions: list[str], group: int
) -> score_lib.Scores:
    """The rewards of `group` completions for each question."""
    repeat = lambda values: [v for v in values for _ in range(group)]  # noqa: E731
    names = questions.problems[0].columns
    columns = {n: repeat([p.columns[n] for p in questions.problems]) for n in names}
    return score_lib.score(rewards, repeat(questions.texts), completions, columns)


def pass_at_k(num_correct: np.ndarray, n: int, k: int) -> float:
    """Chance that at least one of k samples is right, from n samples of each problem.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374), mean
    over problems with `num_correct` right samples each.
    """
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in num_correct]))


def majority(answers: list[str | None], correct: list[bool]) -> bool:
    """Whether the commonest answer is right; among equals, the one given first. None never wins."""
    given = [a for a in answers if a is not None]
    if not given:
        return False
    winner = collections.Counter(given).most_common(1)[0][0]
    return correct[answers.index(winner)]


def run(
    engine: Engine,
    params: Params,
    policy: Policy,
    questions: Questions,
    rewards: list[score_lib.Reward],
    *,
    num_samples: int,
    temperature: float,
    key: Array,
    file: Path | None,
) -> dict[str, float]:
    """Metrics of the policy on the questions, by their logged names.

    `num_samples` 1 is greedy accuracy; more, pass@k, maj@k and the mean by sampling at
    `temperature`. A completion is right when the first reward gives it 1. Every item goes to `file`
    as one JSON object a line.
    """
    greedy = num_samples == 1
    rollouts = engine.generate(
        params,
        questions.prompt_ids,
        group=num_samples,
        key=key,
        temperature=0.0 if greedy else temperature,
    )
    completions = completion_texts(policy, rollouts)
    scores = rewards_of(rewards, questions, completions, num_samples)
    shape = rollouts.length_PG.shape
    correct_PG = (scores.by_name[rewards[0].name] >= 1.0).reshape(shape)
    if file is not None:
        _write_items(file, questions, rollouts, completions, scores)
    if greedy:
        return {
            "eval/accuracy": float(correct_PG.mean()),
            "eval/truncated_share": float(1 - rollouts.stopped_PG.mean()),
            "eval/length": float(rollouts.length_PG.mean()),
        }
    answers = [extract_answer(text) for text in completions]
    votes = [
        majority(answers[p * num_samples : (p + 1) * num_samples], list(correct_PG[p]))
        for p in range(shape[0])
    ]
    return {
        f"eval/pass@{num_samples}": pass_at_k(correct_PG.sum(1), num_samples, num_samples),
        f"eval/maj@{num_samples}": float(np.mean(votes)),
        f"eval/mean@{num_samples}": float(correct_PG.mean()),
    }


def _write_items(file, questions, rollouts, completions, scores) -> None:
    group = rollouts.length_PG.shape[1]
    lines = []
    for row, completion in enumerate(completions):
        p, g = divmod(row, group)
        by_name = {n: float(v[row]) for n, v in scores.by_name.items()}
        item = {
            "prompt": questions.texts[p],
            "columns": questions.problems[p].columns,
            "sample": g,
            "completion": completion,
            "rewards": {n: None if np.isnan(v) else v for n, v in by_name.items()},
            "length": int(rollouts.length_PG[p, g]),
            "stopped": bool(rollouts.stopped_PG[p, g]),
        }
        lines.append(json.dumps(item, default=str))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join(lines) + "\n")
