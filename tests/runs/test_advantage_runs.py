"""Runs with advantages that read more than a reward: greedy completions, each reward, the KL.

One with greedy completions is stopped and goes on in test_changing_objective.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from kill_and_resume import logged
from mistakes import make_model
from plain_rewards import short, worth

import grpo_jax
from grpo_jax.algorithm import advantages

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("advantages") / "model")


def trained(model, folder, rewards, **options):
    """A run, and its samples: all completions of a step that has one prompt."""
    run = grpo_jax.train(
        model, rewards, ROWS, workdir=folder, rollout={"max_tokens": 8}, **options,
        logging={"samples_every_steps": 1, "tensorboard": False}, checkpoint={"every_steps": 0},
    )  # fmt: skip
    return run, logged(run.workdir, "samples.jsonl")


def test_each_reward_has_advantages_of_its_own(model, tmp_path, one_device):
    options = {"aggregate": "each", "scale_by": "sample_std"}
    _, rows = trained(
        model, tmp_path / "run", [worth, (short, -0.5)], prompts=1, group=4, num_steps=1, **options
    )
    assert len(rows) == 4
    reward_1GR = np.array([[[row["rewards"][n] for n in ("worth", "short")] for row in rows]])
    want = advantages.evaluate(options, reward_1GR, [1.0, -0.5])
    np.testing.assert_allclose([[row["advantage"] for row in rows]], want, rtol=1e-4)
    assert np.abs(want).max() > 0.5


def test_the_kl_is_subtracted_from_the_reward(model, tmp_path, one_device):
    """In the first step there is none yet."""
    run, rows = trained(
        model, tmp_path / "run", worth, prompts=1, group=4, num_steps=2, scale_by="none",
        kl_in="reward", kl_coef=2.0, optim={"learning_rate": 3e-3, "max_grad_norm": 0.0},
    )  # fmt: skip
    for step, has_moved in ((1, False), (2, True)):
        own = [row for row in rows if row["step"] == step]
        reward, advantage = (
            np.array([f(row) for row in own])
            for f in (lambda row: row["rewards"]["worth"], lambda row: row["advantage"])
        )
        assert len(own) == 4 and abs(advantage.sum()) < 1e-4
        kl = (reward - reward.mean()) - advantage  # twice the completion's, but for the mean
        assert (np.abs(kl).max() > 1e-3) == has_moved
    steps = [row for row in logged(run.workdir) if "policy/kl" in row]
    assert steps[0]["policy/kl"] < 1e-6 < steps[1]["policy/kl"]  # which is measured all the same


def test_the_reward_of_the_greedy_completion_is_subtracted(model, tmp_path, one_device):
    """With one completion a prompt, and a policy that does not move."""
    run, rows = trained(
        model, tmp_path / "run", worth, prompts=4, group=1, num_steps=3,
        baseline="greedy", scale_by="none", learning_rate=1e-12,
    )  # fmt: skip
    network = grpo_jax.load(model)
    assert len(rows) == 3 and len({row["prompt"] for row in rows}) > 1
    for row in rows:
        (greedy,) = network.generate(row["prompt"], max_tokens=8).texts
        (reward,), (baseline,) = worth([row["completion"]]), worth([greedy])
        assert row["completion"] != greedy and reward != baseline
        assert row["advantage"] == pytest.approx(reward - baseline, abs=1e-5)
    steps = [row for row in logged(run.workdir) if "policy/grad_norm" in row]
    assert len(steps) == 3 and all(row["policy/grad_norm"] > 0 for row in steps)
