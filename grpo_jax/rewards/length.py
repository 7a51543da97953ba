"""Reward for the length of a completion, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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


def _punishment(length: int, limit: int, buffer: int) -> float:
    if length <= limit - buffer:
        return 0.0
    return max(-1.0, (limit - buffer - length) / buffer) if buffer else -1.0
