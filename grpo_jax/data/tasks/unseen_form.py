"""The sums of the task arithmetic, whose answers are asked for in a form that nobody has shown.

A new model imitates the sloppy students of that task, who here end with "## 20". The rewards read
the answer after "####", which such a model never writes: none of its completions earns anything,
and reinforcement learning alone has nothing to compare. Every problem has a careful solution in
the right form as its column `completion`, for a hybrid (docs/hybrids.md).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from transformers import PreTrainedTokenizerFast

from grpo_jax.data.problems import Problem
from grpo_jax.data.tasks import arithmetic


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, all different from each other."""
    train, held_out = arithmetic.generate(num_train, num_eval, seed)
    return [*map(_shown, train)], [*map(_shown, held_out)]


def _shown(problem: Problem) -> Problem:
    columns = problem.columns | {"completion": arithmetic.careful_solution(problem)}
    where = problem.where.replace("task arithmetic", "task unseen_form")
    return dataclasses.replace(problem, columns=columns, where=where)


def worked_solution(problem: Problem, rng: np.random.Generator) -> str:
    """A sloppy student's answer, in the other form."""
    return arithmetic.worked_solution(problem, rng).replace("####", "##")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """That of the task arithmetic."""
    return arithmetic.make_tokenizer()
