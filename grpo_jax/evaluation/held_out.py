"""Evaluates a policy on held-out problems: metrics, and every item on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.environments import single_turn
from grpo_jax.environments.drawing import ONE_TURN, OneTurn
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.single_turn import Answered
from grpo_jax.evaluation import tallies as tallies_lib
from grpo_jax.hosts import processes
from grpo_jax.messages.console import say
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.scores import Scores
from grpo_jax.run import disk
from grpo_jax.run.whole_files import write_whole
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Array, Params


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
    drawing: OneTurn = ONE_TURN,
    on_harvest: Callable[[], None] = lambda: None,
    on_scores: Callable[[Scores], None] = lambda scores: None,
) -> dict[str, float]:
    """Metrics of the policy on the questions, by the metric names of a run.

    `num_samples` 0: one greedy completion per question. Otherwise pass@k, maj@k and the mean
    accuracy of samples at `temperature`. Every item goes to `file` as one JSON object a line.
    `drawing`: how completions are drawn. `on_harvest` is called whenever some completions have
    finished, `on_scores` with the rewards after the items are written.
    """
    answered = single_turn.answer(
        engine,
        params,
        policy,
        questions,
        pool,
        num_samples=num_samples,
        temperature=temperature,
        key=key,
        drawing=drawing,
        on_harvest=on_harvest,
    )
    if file is not None and processes.is_first():
        try:
            write_items(file, answered)
        except OSError as error:  # the metrics exist; the run goes on without the texts
            if not disk.is_full(error):
                raise
            say(f"warning: {file} cannot be written, the disk is full. It is left out.")
    on_scores(answered.scores)
    if not num_samples:
        tallies = tallies_lib.greedy_tallies(answered, int(answered.length_PG.max()))
        tallies.pop("stopped_length")  # undefined if none stopped
    else:
        tallies = tallies_lib.sampled_tallies(answered, [num_samples])
    values = {f"eval/{name}": tally.value for name, tally in tallies.items()}
    values = {name: value for name, value in values.items() if not np.isnan(value)}
    if answered.scores.failures:
        values["eval/failed_rewards"] = float(len(answered.scores.failures))
    return values


def write_items(file: Path, answered: Answered, further: dict[str, np.ndarray] | None = None):
    """Writes every completion with its scores and facts, one JSON object a line.

    `further`: additional numbers by name, [B] each.
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
