"""TRL 1.16's reward functions by their names: `from grpo_jax.trl.rewards import accuracy_reward`.

They have TRL's arguments and results. Answers are compared by `math_answer`, which also reads an
answer after #### and in <answer>, and cannot hang.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.answers import answer_fault
from grpo_jax.rewards.completions import text_of
from grpo_jax.rewards.math_answer import math_answer

_THOUGHT = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)


def accuracy_reward(
    completions: Sequence[Any], solution: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 if a completion's answer equals its solution's, else 0.0; None if that has no answer.

    `completions`: texts, or chats of one message; `solution`: numbers, texts or LaTeX.
    """
    given = [completion for completion, value in zip(completions, solution) if _is_read(value)]
    answers = [value for value in solution if _is_read(value)]
    rewards = iter(math_answer([""] * len(given), given, answers))
    return [next(rewards) if _is_read(value) else None for value in solution]


def _is_read(solution: Any) -> bool:
    return answer_fault(solution) is None


def reasoning_accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    reasoning_delimiters: Sequence[str] = ("</think>",),
    **columns: Any,
) -> list[float | None]:
    """`accuracy_reward` of the text after the last delimiter; 0.0 if there is none."""
    ends = re.compile("|".join(map(re.escape, reasoning_delimiters)))
    texts = [ends.split(text_of(completion)) for completion in completions]
    rewards = accuracy_reward([parts[-1] for parts in texts], solution)
    return [
        0.0 if reward is not None and len(parts) == 1 else reward
        for reward, parts in zip(rewards, texts)
    ]


def think_format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 for a completion that begins with one "<think>...</think>", else 0.0."""
    return [float(_THOUGHT.match(text_of(completion)) is not None) for completion in completions]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable:
    """0 up to `soft_punish_cache` tokens below the limit, from there down to -1 at the limit.

    Yu et al. 2025, "DAPO", arXiv:2503.14476, equation 13.
    """
    return _SoftOverlong(max_completion_len, soft_punish_cache)


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable:
    """`max_penalty` times the share of a completion's n-grams of tokens that repeat others.

    Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning", arXiv:2502.03373, appendix C.2.
    Raises ValueError for a penalty above 0.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty = {max_penalty} must not be above 0.")
    return _Repetition(ngram_size, max_penalty)


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable:
    """`accuracy_reward` scaled by the completion's length along half a cosine to `max_len` tokens.

    A shorter right completion gets more; a shorter wrong completion gets less. Yeo et al. 2025,
    arXiv:2502.03373, appendix C.1.
    """
    return _Cosine(
        max_len, (min_value_wrong, max_value_wrong), (max_value_correct, min_value_correct)
    )


class _SoftOverlong:
    __name__ = "soft_overlong_punishment_reward"  # as metrics show it

    def __init__(self, limit: int, margin: int):
        self._limit, self._margin = limit, margin

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        begin = self._limit - self._margin
        return [
            0.0 if n <= begin else (begin - n) / self._margin if n <= self._limit else -1.0
            for n in map(len, completion_ids)
        ]


class _Repetition:
    __name__ = "repetition_penalty_reward"

    def __init__(self, size: int, penalty: float):
        self._size, self._penalty = size, penalty

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [self._of(list(ids)) for ids in completion_ids]

    def _of(self, ids: list[int]) -> float:
        grams = [tuple(ids[i : i + self._size]) for i in range(len(ids) - self._size + 1)]
        repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
        return repeated * self._penalty if repeated else 0.0


class _Cosine:
    __name__ = "cosine_scaled_reward"

    def __init__(self, limit: int, wrong: tuple[float, float], right: tuple[float, float]):
        """`wrong`, `right`: the rewards of an empty completion, and of one at the limit."""
        self._limit, self._wrong, self._right = limit, wrong, right

    def __call__(
        self,
        completions: Sequence[Any],
        solution: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        rewards = accuracy_reward(completions, solution)
        return [
            None if reward is None else self._scaled(reward, len(ids))
            for reward, ids in zip(rewards, completion_ids)
        ]

    def _scaled(self, reward: float, tokens: int) -> float:
        short, long = self._right if reward else self._wrong
        share = min(tokens / self._limit, 1.0)
        return long + 0.5 * (short - long) * (1.0 + math.cos(share * math.pi))
