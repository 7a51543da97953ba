"""Runs whose baseline is a greedy completion: what is subtracted, and resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kill_and_resume import log_differences, logged, state_differences
from mistakes import make_model

import grpo_jax

HELPERS = Path(__file__).parent.parent / "helpers"
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 9)]


def worth(completions, **columns):
    """Another number for about every completion."""
    return [sum(map(ord, c)) % 97 / 10 for c in completions]


def test_the_reward_of_the_greedy_completion_is_subtracted(tmp_path, one_device):
    """With one completion a prompt, and a policy that does not move."""
    model = make_model(tmp_path / "model")
    run = grpo_jax.train(
        model, worth, ROWS, workdir=tmp_path / "run", prompts=4, group=1, num_steps=3,
        baseline="greedy", scale_by="none", learning_rate=1e-12, rollout={"max_tokens": 8},
        logging={"samples_every_steps": 1, "tensorboard": False}, checkpoint={"every_steps": 0},
    )  # fmt: skip
    rows, network = logged(run.workdir, "samples.jsonl"), grpo_jax.load(model)
    assert len(rows) == 3 and len({row["prompt"] for row in rows}) > 1
    for row in rows:
        (greedy,) = network.generate(row["prompt"], max_tokens=8).texts
        (reward,), (baseline,) = worth([row["completion"]]), worth([greedy])
        assert row["completion"] != greedy and reward != baseline
        assert row["advantage"] == pytest.approx(reward - baseline, abs=1e-5)
    steps = [row for row in logged(run.workdir) if "policy/grad_norm" in row]
    assert len(steps) == 3 and all(row["policy/grad_norm"] > 0 for row in steps)


# Left while it waited for rewards, with completions that are in a checkpoint and greedy ones that
# are not; and stopped within a step, 4 updates each.
STOPS = {"rewards": {"in": "rewards", "after": 4}, "within": {"after": 6}}
OPTIONS = [
    "--config.algorithm.baseline=greedy",
    "--config.algorithm.scale_by=none",
    "--config.optim.learning_rate=0.05",
    "--config.loop.num_steps=3",
    "--config.evaluation.num_problems=0",
]


@pytest.mark.slow
def test_a_stopped_run_continues_as_if_it_had_not_been(tmp_path, alone):
    def drive(names, **stops):
        jobs = []
        for name in names:
            argv = ["--config", str(HELPERS / "tiny_config.py"), "--workdir", str(tmp_path / name)]
            if name != "whole":
                model = tmp_path / "whole" / "bootstrap" / "export"
                argv.append(f"--config.model.path={model}")
            more = ["--config.algorithm.baseline=mean"] if name == "mean" else []
            jobs.append({"argv": [*argv, *OPTIONS, *more], "of": "update", **stops.get(name, {})})
        command = [sys.executable, str(HELPERS / "drive.py"), json.dumps(jobs)]
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"end"')]
        return [json.loads(line)["end"] for line in lines]

    whole, mean, *stopped = drive(["whole", "mean", *STOPS], **STOPS)
    assert whole == mean == "finished"
    assert all(end.startswith("Stopped by SIGTEST") for end in stopped), stopped
    assert drive(STOPS) == ["finished"] * len(STOPS)
    for name in STOPS:
        assert not state_differences(tmp_path / "whole", tmp_path / name)
        assert not log_differences(tmp_path / "whole", tmp_path / name)
    assert state_differences(tmp_path / "whole", tmp_path / "mean")
