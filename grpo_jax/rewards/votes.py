"""Groups a problem's samples by equal answers, as the reward compares them.

Comparing answers as mathematics can take long or crash. So it runs like rewards: in worker
processes that can be killed, under the same limits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from grpo_jax.rewards import registry
from grpo_jax.rewards.answers import Same, extract_answer
from grpo_jax.rewards.completions import begin_in_thinking, text_of
from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.rewards.registry import Reward

_MAX_COMPARED = 64  # different answers of a problem that a new one is compared with
_MAX_WORKERS = 4


def same_answer_of(spec: str) -> Same | None:
    """A reward function's comparison of answers, its attribute `same_answer`; or None.

    It takes two answers from `extract_answer`; a reward without it does not read answers.
    """
    found: Callable = registry.function(spec)
    return getattr(getattr(found, "func", found), "same_answer", None)


def count_votes(
    reward: Reward,
    prompts: list[Any],
    completions: list[Any],
    rendered_prompts: list[str],
    num_samples: int,
    limits: Limits,
) -> np.ndarray:
    """For each sample, the number of the first with an equal answer, -1 without one; int64 [P, K].

    Row i of the lists belongs to completion i; a problem has `num_samples` consecutive rows. The
    reward must have a `same_answer`. If a comparison fails or takes too long, each sample of the
    problem has its own vote. Raises RewardError if no worker can be started.
    """
    rows = len(completions)
    own = np.tile(np.arange(num_samples), rows // num_samples)
    voting = Reward("votes", f"grpo_jax.rewards.votes:first_equal(reward={reward.spec!r})", 1.0)
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with Pool([voting], num_workers=workers, limits=limits) as pool:
        ticket = pool.submit(
            prompts,
            completions,
            {"sample": own.tolist()},
            rendered_prompts=rendered_prompts,
            group=num_samples,
        )
        scores = ticket.result()
    vote_B = np.where(scores.failed["votes"], own, np.nan_to_num(scores.by_name["votes"], nan=-1))
    return vote_B.astype(np.int64).reshape(-1, num_samples)


def first_equal(
    prompts: list[Any],
    completions: list[Any],
    sample: list[int],
    reward: str,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The votes of one problem's completions: the `sample` of the first with an equal answer.

    None if a completion has no answer. `reward` is the name of the function with the `same_answer`.
    """
    same = same_answer_of(reward)
    thinking = begin_in_thinking(prompts, rendered_prompts)
    answers = [
        extract_answer(text_of(c), t, same) for c, t in zip(completions, thinking, strict=True)
    ]
    return [None if first < 0 else float(sample[first]) for first in votes(answers, same)]


def votes(answers: list[str | None], same: Same) -> np.ndarray:
    """For each answer, the index of the first equal answer; -1 for None; int64 [K].

    `same` compares with a problem's first 64 different answers. Later ones are compared only as
    texts, to avoid quadratic cost.
    """
    first_of: dict[str, int] = {}
    different: list[str] = []
    for i, answer in enumerate(answers):
        if answer is not None and answer not in first_of:
            equal = next((a for a in different[:_MAX_COMPARED] if same(a, answer)), None)
            if equal is None:
                different.append(answer)
            first_of[answer] = i if equal is None else first_of[equal]
    return np.array([-1 if a is None else first_of[a] for a in answers], np.int64)
