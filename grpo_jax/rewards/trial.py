"""Tries rewards on given completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.data.problems import Problem, as_reply
from grpo_jax.messages.progress import show_progress
from grpo_jax.rewards import ensembles, relations
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
        scores = scores_lib.with_models(scores, pool.measured, by_model, seconds)
    scores = ensembles.add(scores, pool.rewards)
    return scores, time.monotonic() - began


def figures(scores: Scores, seconds: float, lengths: Sequence[int]) -> dict[str, Any]:
    """The output of `--json`: each reward's distribution over the rows with a value, and its cost.

    `lengths`: of the texts, characters. Correlations are by name, None where there is none.
    """
    rewards = {}
    for name, value_B in scores.by_name.items():
        known_B = value_B[~np.isnan(value_B)]
        measured = {
            "mean": known_B.mean,
            "std": known_B.std,
            "min": known_B.min,
            "median": lambda known_B=known_B: np.median(known_B),
            "max": known_B.max,
        }
        rewards[name] = {
            **{n: float(f()) if len(known_B) else None for n, f in measured.items()},
            "ones": int((value_B == 1.0).sum()),
            "failed": int(scores.failed[name].sum()),
            "none": int((np.isnan(value_B) & ~scores.failed[name]).sum()),
            "seconds_per_1000": 1000 * float(scores.seconds[name].mean()),
        }
    columns = related(scores, lengths)
    number_MM = relations.correlations(columns)
    rows = len(scores.reward_B)
    return {
        "rows": rows,
        "rewards": rewards,
        "correlations": {
            one: {
                other: None if np.isnan(value) else float(value)
                for other, value in zip(columns, row)
            }
            for one, row in zip(columns, number_MM)
        },
        "per_1000": {name: 1000 * total / rows for name, total in scores.sums.items()},
        "logged": {name: total / count for name, (total, count) in scores.metrics.items()},
        "rows_per_second": rows / max(seconds, 1e-9),
    }


def related(scores: Scores, lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns that are compared: each reward, and the length of the texts, characters."""
    return {**scores.by_name, "length": np.asarray(lengths, np.float64)}


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
