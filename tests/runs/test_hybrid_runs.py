"""Whole runs of hybrids and of distillation: stopped and continued, they are as if left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kill_and_resume import log_differences, logged, state_differences

HELPERS = Path(__file__).parents[1] / "helpers"
OPTIONS = {
    "data.task": "unseen_form",
    "rewards.names": ("exact_answer",),
    "rewards.weights": (1.0,),
    "rollout.max_tokens": 40,
    "algorithm.kl_coef": 0.0,
    "algorithm.num_iterations": 1,
    "loop.num_steps": 3,
    "evaluation.num_problems": 0,
    "logging.tensorboard": False,
    "checkpoint.export": False,
}
RUNS = {
    # Completions are sampled a step ahead; the share of the nll changes at each step.
    "chord": {
        "hybrid.method": "chord",
        "hybrid.mix_decay_steps": 4,
        "loop.async_rollouts": True,
        "rollout_correction.level": "token",
    },
    "uft": {"hybrid.method": "uft", "hybrid.hint_steps": 2},
    # Without rewards.
    "distill": {
        "distill.beta": 0.5,
        "data.task": "arithmetic",
        "rewards.names": (),
        "rewards.weights": (),
    },
}
STOPPED = {"after": 3}  # between the two updates of step 2; of "chord", with step 3 sampled


@pytest.fixture(scope="module")
def runs(tmp_path_factory, drive_here) -> Path:
    """Each run left alone, and stopped and continued; all from one model, which is the teacher."""
    root = tmp_path_factory.mktemp("hybrids")
    start = root / "chord" / "bootstrap" / "export"

    def job(name: str, folder: str, **stop) -> dict:
        options = OPTIONS | RUNS[name]
        options |= {} if folder == "chord" else {"model.path": start}
        options |= {"distill.teacher": start} if name == "distill" else {}
        argv = ["--config", str(HELPERS / "tiny_config.py"), "--workdir", str(root / folder)]
        return {"argv": [*argv, *(f"--config.{k}={v}" for k, v in options.items())], **stop}

    jobs = []
    for name in RUNS:
        jobs += [job(name, name), job(name, f"{name}-stopped", **STOPPED)]
        jobs.append(job(name, f"{name}-stopped"))
    ends = drive_here(jobs)
    assert [end.split()[0] for end in ends] == ["finished", "Stopped", "finished"] * 3, ends
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_continued_run_is_as_if_it_was_left_alone(runs, name):
    alone, again = runs / name, runs / f"{name}-stopped"
    assert not state_differences(alone, again)
    assert not log_differences(alone, again)


def test_the_schedules_follow_from_the_step(runs):
    mixes = [row["hybrid/mix"] for row in logged(runs / "chord") if "hybrid/mix" in row]
    want = [0.05 + 0.85 * (1 + np.cos(np.pi * n / 4)) / 2 for n in range(3)]
    np.testing.assert_allclose(mixes, want, rtol=1e-6)
    hints = [
        row["hybrid/hint_tokens"] for row in logged(runs / "uft") if "hybrid/hint_tokens" in row
    ]
    assert hints[0] > 3 > hints[1] >= 0 == hints[2]  # .5, .05, none


def test_rewards_of_demonstrations_are_told_apart(runs):
    rows = [row for row in logged(runs / "chord") if "reward" in row]
    assert [row["hybrid/given_reward"] for row in rows] == [1.0] * 3  # careful solutions
    assert [row["reward"] for row in rows] == [0.0] * 3
    assert all(row["completion/length"] <= 40 for row in rows)
    generated = rows[-1]["tokens/generated"]
    assert generated == pytest.approx(sum(16 * row["completion/length"] for row in rows))


def test_a_student_alone_with_its_teacher_has_no_rewards(runs):
    rows = [row for row in logged(runs / "distill") if "distill/loss" in row]
    assert len(rows) == 3
    names = {name for row in rows for name in row}
    assert not [name for name in names if name.startswith(("reward", "groups", "accuracy"))]
    assert 0 <= rows[0]["distill/loss"] < 1e-4  # the policy begins as the teacher
    assert rows[0]["policy/loss"] == 0
