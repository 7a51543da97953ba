"""Tries rewards on given completions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from grpo_jax.data.problems import Problem, as_reply
from grpo_jax.messages.progress import show_progress
from grpo_jax.rewards import scores as scores_lib
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.scores import Scores


def score(
    pool: Pool,
    problems: list[Problem],
    texts: list[str],
    ids: list | None,
    rendered: list[str] | None,
    batch: int,
) -> tuple[Scores, float]:
    """The scores, and the seconds that they took, without the start of the workers."""
    pool.wait_ready()
    began = time.monotonic()
    ticket = pool.submit(
        [p.prompt for p in problems],
        [as_reply(p, text) for p, text in zip(problems, texts)],
        {name: [p.columns[name] for p in problems] for name in problems[0].columns},
        completion_ids=ids,
        rendered_prompts=rendered,
        group=batch,
    )
    show_progress("scoring", ticket.progress)
    scores = ticket.result()
    if pool.models:
        before = time.monotonic()
        by_model = pool.models(problems, texts, 1)
        seconds = time.monotonic() - before
        scores = scores_lib.with_models(scores, pool.rewards, by_model, seconds)
    return scores, time.monotonic() - began


def figures(scores: Scores, seconds: float) -> dict[str, Any]:
    """The output of `--json`: each reward's mean and deviation over the rows with a value."""
    rewards = {}
    for name, value_B in scores.by_name.items():
        known_B = value_B[~np.isnan(value_B)]
        rewards[name] = {
            "mean": float(known_B.mean()) if len(known_B) else None,
            "std": float(known_B.std()) if len(known_B) else None,
            "ones": int((value_B == 1.0).sum()),
            "failed": int(scores.failed[name].sum()),
            "none": int((np.isnan(value_B) & ~scores.failed[name]).sum()),
        }
    rows = len(scores.reward_B)
    return {"rows": rows, "rewards": rewards, "rows_per_second": rows / max(seconds, 1e-9)}


def item(i: int, problem: Problem, text: str, scores: Scores) -> dict[str, Any]:
    prompt = problem.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt)
    values = {name: float(value_B[i]) for name, value_B in scores.by_name.items()}
    return {
        "where": problem.where,
        "prompt": prompt,
        "completion": text,
        "rewards": {name: None if np.isnan(v) else v for name, v in values.items()},
        "failed": [name for name, failed_B in scores.failed.items() if failed_B[i]],
        "seconds": {name: float(seconds_B[i]) for name, seconds_B in scores.seconds.items()},
        "extras": {name: column[i] for name, column in scores.extras.items()},
    }
