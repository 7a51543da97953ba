"""The completions of a step that are shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from grpo_jax.config import options as options_lib
from grpo_jax.data.problems import Problem
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.rewards import registry
from grpo_jax.rewards.scores import Scores
from grpo_jax.trainers import rollout
from grpo_jax.trainers.listeners import Listeners
from grpo_jax.trainers.runs import Course

# Of two prompts with four completions each the second is the more divided; one reward is unknown.
REWARD_B = np.float32([0.5, 0.5, 0.5, 0.25, 1.0, np.nan, 1.0, 0.0])
PROBLEMS = [
    Problem("1st", {"answer": "1"}),
    Problem("2nd", {"answer": "w" * 300 + "#### " + "x" * 300, "source": "a book"}),
]
LENGTH_PG = np.arange(8, dtype=np.int32).reshape(2, 4)


ADVANTAGE_PG = np.arange(8).reshape(2, 4) / 8


def shown(step: int, **options) -> list[dict] | None:
    config = options_lib.default()
    config.batch.group = 4
    config.logging.update({"samples_every_steps": 1, "num_samples": 3} | options)
    scores = Scores(
        REWARD_B,
        {"right": REWARD_B, "long": 2 * REWARD_B},
        {},
        {},
        extras={"note": list("abcdefgh")},
    )
    sampled = Rollout(
        questions=SimpleNamespace(texts=["first", "second"], problems=PROBLEMS),
        rewards=SimpleNamespace(
            texts=lambda numbers: [f"{p}-{g}" for p in numbers for g in range(4)]
        ),
        completions=SimpleNamespace(length_PG=LENGTH_PG),
        seconds=1.0,
    )
    written = []
    writers = SimpleNamespace(samples=lambda step, rows: written.append((step, rows)))
    rollout.show(
        SimpleNamespace(
            config=config,
            rewards=SimpleNamespace(rewards=registry.load(("exact_answer",), (1.0,))),
            course=Course(9, 2, samples_every=config.logging.samples_every_steps),
        ),
        writers,
        Listeners((), Path(), None),
        step,
        sampled,
        scores,
        lambda: ADVANTAGE_PG,
    )
    if not written:
        return None
    ((at, rows),) = written
    assert at == step
    return rows


def test_the_best_and_the_worst_of_the_most_divided_group():
    rows = shown(1)
    # Of rewards 1, ?, 1, 0 the two best, then the last.
    assert [row["completion"] for row in rows] == ["1-0", "1-2", "1-3"]
    assert [row["advantage"] for row in rows] == [4 / 8, 6 / 8, 7 / 8]
    assert [row["length"] for row in rows] == [4, 6, 7]
    assert [row["extras"] for row in rows] == [{"note": "e"}, {"note": "g"}, {"note": "h"}]
    assert {row["prompt"] for row in rows} == {"second"}
    assert rows[0]["rewards"] == {"right": 1.0, "long": 2.0}
    # Of the columns that which the reward reads, cut in its middle.
    shortened = f"{'w' * 200} [... 205 characters ...] {'x' * 200}"
    assert [row["columns"] for row in rows] == [{"answer": shortened}] * 3


def test_an_unknown_reward_is_shown_as_none():
    rows = shown(1, num_samples=4)
    assert [row["completion"] for row in rows] == ["1-0", "1-2", "1-1", "1-3"]
    assert rows[2]["rewards"] == {"right": None, "long": None} and rows[2]["advantage"] == 5 / 8
    assert len(shown(1, num_samples=9)) == 4
    assert [row["completion"] for row in shown(1, num_samples=1)] == ["1-0"]


def test_steps_that_are_shown():
    assert [bool(shown(step, samples_every_steps=3)) for step in range(1, 6)] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert shown(1, samples_every_steps=0) is None
