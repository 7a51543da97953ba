"""The completions of a step: drawn, held on the host until they are learned from, and shown."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from grpo_jax import evaluation, keys
from grpo_jax import metrics as metrics_lib
from grpo_jax.algorithm import advantages
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.judge import Judge
from grpo_jax.lines import Lines
from grpo_jax.parts import Parts
from grpo_jax.phases import phase
from grpo_jax.position import Position
from grpo_jax.rewards.score import Scores
from grpo_jax.structs import Rollouts, TrainState


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The completions of one step, on the host, and their judge."""

    questions: evaluation.Questions
    judge: Judge
    rollouts: Rollouts
    seconds: float  # that sampling took


def draw(
    parts: Parts,
    state: TrainState,
    at: Position,
    lines: Lines,
    on_harvest: Callable[[], None],
    *,
    ahead: int = 0,
) -> Drawn:
    """Samples the completions of the step `ahead` of where the run stands.

    Once the device is busy it writes the line that is open. `on_harvest` is called whenever some
    completions have finished, on all processes alike.
    """
    started, step = time.monotonic(), at.step + ahead
    questions, judge = _begin(parts, at, step)
    with phase("rollout"):
        rollouts = parts.engine.generate(
            parts.engine.publish(state.params),
            questions.prompt_ids,
            group=parts.config.batch.group,
            key=keys.key_for(parts.config.seed, "rollout", at.draw_of(step)),
            temperature=parts.config.rollout.temperature,
            on_group=judge.add,
            meanwhile=lines.close,
            on_harvest=on_harvest,
        )
    seconds = time.monotonic() - max(started, lines.closed_at)
    return Drawn(questions, judge, rollouts, seconds)


def drawn_before(parts: Parts, at: Position, rollouts: Rollouts) -> Drawn:
    """Completions that a checkpoint held, given to a judge as if just sampled."""
    step = at.step + bool(at.update)
    questions, judge = _begin(parts, at, step)
    for number, (completion_GC, length_G) in enumerate(
        zip(rollouts.completion_PGC, rollouts.length_PG)
    ):
        judge.add(number, [ids[:n].tolist() for ids, n in zip(completion_GC, length_G)])
    return Drawn(questions, judge, rollouts, at.ahead_s)


def show(
    parts: Parts, writers: metrics_lib.Writers, step: int, drawn: Drawn, scores: Scores
) -> None:
    """Writes and prints completions of the step, where logging.samples_every_steps asks for it."""
    every = parts.config.logging.samples_every_steps
    if not every or (step - 1) % every:
        return
    group = parts.config.batch.group
    # Of rewards that are unknown, this shows what a 0 would be worth.
    reward_PG = np.nan_to_num(scores.reward_B, nan=0.0).reshape(-1, group)
    scale_by = parts.config.algorithm.scale_by
    relative_PG = np.asarray(advantages.group_advantages(reward_PG, scale_by=scale_by))
    # Of the most divided group: what the policy is about to learn from.
    p = int(reward_PG.std(1).argmax())
    texts = drawn.judge.texts([p])
    best_first = np.argsort(-reward_PG[p], kind="stable")
    num_best = -(-parts.config.logging.num_samples // 2)
    num_worst = min(parts.config.logging.num_samples - num_best, group - num_best)
    rows = []
    for g in [*best_first[:num_best], *best_first[group - max(num_worst, 0) :]]:
        row = p * group + g
        by_name = {n: float(v[row]) for n, v in scores.by_name.items()}
        rows.append(
            {
                "prompt": drawn.questions.texts[p],
                "completion": texts[g],
                "rewards": {n: None if np.isnan(v) else v for n, v in by_name.items()},
                "extras": {n: v[row] for n, v in scores.extras.items()},
                "advantage": float(relative_PG[p, g]),
                "length": int(drawn.rollouts.length_PG[p, g]),
            }
        )
    writers.samples(step, rows)
    metrics_lib.print_samples(f"Completions of step {step}", rows)


def _begin(parts: Parts, at: Position, step: int) -> tuple[evaluation.Questions, Judge]:
    """What the completions of a step are to answer, and who judges them."""
    config, draw, num_problems = parts.config, at.draw_of(step), len(parts.train.problems)
    questions = parts.train.take(
        prompts_lib.prompt_indices(config.seed, draw, num_problems, config.batch.prompts)
    )
    seen = {
        "global_step": step,
        "max_steps": config.loop.num_steps,
        "epoch": draw * config.batch.prompts / num_problems,
    }
    judge = Judge(
        parts.rewards, parts.policy, questions.problems, questions.texts, config.batch.group, seen
    )
    return questions, judge
