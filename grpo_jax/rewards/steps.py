"""Reward for a chain of reasoning whose computed steps are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_jax.rewards import equations
from grpo_jax.rewards.completions import text_of

_MAX_CHARS = 200_000  # of a completion


def right_steps(
    prompts: list[Any],
    completions: list[Any],
    without: float = 0.0,
    rounded: bool = True,
    log_metric: Callable[[str, float], None] | None = None,
    log_steps: Callable[[list], None] | None = None,
    **columns: Any,
) -> list[float]:
    """Share of a completion's steps before the first wrong one, in 0..1.

    A step is an equation between numbers, thinking included, checked with exact fractions; a result
    may be `rounded` to the decimals that it shows. With 4 steps of which the third is wrong it is
    0.5, whatever the fourth is. `without`: the value of a completion without steps. Logs the number
    of steps, and the share of right ones. Its steps, for `rewards.by_step`: 1 for each right one
    before the first wrong one, and 0 for that.
    """
    rewards, steps = [], []
    for completion in completions:
        found = equations.find(text_of(completion)[:_MAX_CHARS], rounded=rounded)
        right = [step.is_right for step in found]
        first_wrong = right.index(False) if False in right else len(right)
        rewards.append(first_wrong / len(right) if right else float(without))
        steps.append([(step.end, float(step.is_right)) for step in found[: first_wrong + 1]])
        if log_metric is not None:
            log_metric("right_steps.steps", len(right))
            if right:
                log_metric("right_steps.right_share", sum(right) / len(right))
    if log_steps is not None:
        log_steps(steps)
    return rewards


def _refuse(without: Any = 0.0, rounded: Any = True) -> None:
    if not isinstance(without, (int, float)) or not abs(without) < float("inf"):
        raise ValueError(f"without = {without!r} must be a finite number")


right_steps.options, right_steps.refuse = ("without", "rounded"), _refuse
