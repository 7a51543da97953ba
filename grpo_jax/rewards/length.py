"""Rewards for the length of a completion, in tokens: alone, or beside a right or wrong answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import answer_fault
from grpo_jax.rewards.math_answer import math_answer


def soft_overlong(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[Sequence[int]] | None = None,
    max_completion_tokens: int | None = None,
    buffer: int | None = None,
    **columns: Any,
) -> list[float]:
    """0.0 for completions that end well before the limit, falling linearly to -1.0 at it.

    The soft over-long punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13): with the
    limit L = `max_completion_tokens` and the buffer C, 0 up to L - C tokens, then (L - C - length)
    / C, and -1 beyond L. C is `buffer`, or a fifth of L rounded to a token (the paper has 4,096 of
    20,480). Lengths count `completion_ids`, the stop token included. A buffer of 0 punishes only
    lengths beyond the limit. Raises ValueError without `completion_ids` or the limit, and for a
    buffer that is negative or above the limit.
    """
    if completion_ids is None or max_completion_tokens is None:
        missing = "completion_ids" if completion_ids is None else "max_completion_tokens"
        raise ValueError(f"soft_overlong counts tokens and needs `{missing}`, which is not given.")
    limit = max_completion_tokens
    buffer = max(1, round(limit / 5)) if buffer is None else buffer
    if not 0 <= buffer <= limit:
        raise ValueError(
            f"soft_overlong: buffer = {buffer} tokens, but the limit of a completion is {limit}. "
            f"Choose a buffer between 0 and {limit}."
        )
    return [_punishment(len(ids), limit, buffer) for ids in completion_ids]


def cosine_length(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    completion_ids: list[Sequence[int]] | None = None,
    max_completion_tokens: int | None = None,
    limit: int | None = None,
    right: Sequence[float] = (1.0, 0.5),
    wrong: Sequence[float] = (-1.0, -0.5),
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """`math_answer`, scaled by length along half a cosine (Yeo et al. 2025, arXiv:2502.03373).

    `right` and `wrong` are the rewards of a right and of a wrong completion: one without tokens,
    and one of `limit` tokens or more. So a right answer is worth more when it is short, and a wrong
    one costs less when it is long (appendix C.1). `limit`: by default the run's. TRL's
    `get_cosine_scaled_reward` is the same; open-r1's counts characters. Raises ValueError without
    `completion_ids` or the limit.
    """
    limit = max_completion_tokens if limit is None else limit
    _refuse_missing("cosine_length", completion_ids, limit)
    is_right = math_answer(prompts, completions, answer, rendered_prompts)
    rewards = []
    for correct, ids in zip(is_right, completion_ids, strict=True):
        short, long = right if correct else wrong
        share = min(len(ids) / limit, 1.0)
        rewards.append(long + 0.5 * (short - long) * (1.0 + math.cos(share * math.pi)))
    return rewards


def relative_length(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    completion_ids: list[Sequence[int]] | None = None,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """0.5 for the shortest of a prompt's completions, down to -0.5 for the longest.

    A completion that `math_answer` finds wrong gets at most 0. The length reward of Kimi k1.5
    (2025, arXiv:2501.12599, section 2.3.3), in tokens; open-r1's `len_reward` counts characters.
    All get 0 if they are equally long. Raises ValueError without `completion_ids`.
    """
    _refuse_missing("relative_length", completion_ids, 1)
    lengths = [len(ids) for ids in completion_ids]
    least, most = min(lengths, default=0), max(lengths, default=0)
    if least == most:
        return [0.0] * len(lengths)
    is_right = math_answer(prompts, completions, answer, rendered_prompts)
    shares = [0.5 - (length - least) / (most - least) for length in lengths]
    return [share if correct else min(share, 0.0) for share, correct in zip(shares, is_right)]


def _refuse_buffer(buffer: Any = None) -> None:
    if buffer is not None and (not isinstance(buffer, int) or buffer < 0):
        raise ValueError(f"buffer = {buffer!r} tokens must be 0 or more")


def _refuse_cosine(limit: Any = None, right: Any = (1, 0), wrong: Any = (0, 0)) -> None:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit = {limit!r} tokens must be at least 1")
    for name, pair in (("right", right), ("wrong", wrong)):
        fine = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not fine or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in pair):
            raise ValueError(f"{name} = {pair!r} must be two numbers: without tokens, at the limit")


soft_overlong.options, soft_overlong.refuse = ("buffer",), _refuse_buffer
cosine_length.options = ("limit", "right", "wrong")
cosine_length.refuse = _refuse_cosine
relative_length.options = ()
cosine_length.column_faults = relative_length.column_faults = {"answer": answer_fault}


def _refuse_missing(name: str, ids: Any, limit: int | None) -> None:
    missing = "completion_ids" if ids is None else "max_completion_tokens"
    if ids is None or not limit:
        raise ValueError(f"{name} counts tokens and needs `{missing}`, which is not given.")


def _punishment(length: int, limit: int, buffer: int) -> float:
    if length <= limit - buffer:
        return 0.0
    return max(-1.0, (limit - buffer - length) / buffer) if buffer else -1.0
