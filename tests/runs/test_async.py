"""Rollouts a step ahead, with every option of low precision: whose weights draw them, and resuming.

Resumed runs end bit for bit as the one that was left alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_and_resume import log_differences, logged, state_differences
from mistakes import make_model

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
OPTIONS = [
    "--config.loop.async_rollouts=True",
    "--config.rollout_correction.level=sequence",
    "--config.rollout.weights_dtype=int8",
    "--config.rollout.kv_cache_dtype=int8",
    "--config.optim.moments_dtype=int8",
    "--config.model.param_dtype=bfloat16",
    "--config.optim.learning_rate=0.05",
    "--config.evaluation.num_problems=0",
    "--config.rewards.names=['plain_rewards:worth']",
    "--config.rewards.weights=[1.0]",
]
# Of a rate that moves nothing; its optimizer, which has nothing to keep, is quick to compile.
STILL = ["--config.optim.learning_rate=1e-12", "--config.optim.moments_dtype=float32"]
# Stopped after so many updates, 4 to a step: between steps, and within one.
STOPS = {"between": 4, "within": 6}
# One of them with what may lie in the host's memory there, which binds nothing and changes nothing.
IN_HOST_MEMORY = ["--config.optim.offload=True", "--config.model.offload_reference=True"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, drive_here):
    """The folder of all runs: whole, its like without learning, its like in step, and stopped."""
    root = tmp_path_factory.mktemp("async")
    model = f"--config.model.path={make_model(root / 'model')}"

    def job(name, *more, **stop):
        argv = [
            "--config",
            str(HERE.parent / "helpers" / "tiny_config.py"),
            "--workdir",
            str(root / name),
        ]
        more += tuple(IN_HOST_MEMORY) if name == "within" else ()
        return {"argv": [*argv, model, *OPTIONS, *more], **stop}

    first = [
        job("whole"),
        job("still", *STILL),
        job("in step", "--config.loop.async_rollouts=False"),
        *(job(name, of="update", after=after) for name, after in STOPS.items()),
    ]
    ends = drive_here(first)
    assert ends[:3] == ["finished"] * 3
    assert all(end.startswith("Stopped by SIGTEST") for end in ends[3:])
    longer = job("whole", "--config.loop.num_steps=5")
    ends = drive_here([*(job(name) for name in STOPS), longer])
    assert ends[:2] == ["finished"] * 2
    return root, ends[2]


def completions(folder: Path, step: int) -> list[tuple]:
    rows = logged(folder, "samples.jsonl")
    found = [(row["prompt"], row["completion"]) for row in rows if row["step"] == step]
    assert found
    return sorted(found)


def test_a_step_is_sampled_before_the_updates_of_the_step_before(runs):
    root, _ = runs
    for step, as_without_learning in ((1, True), (2, True), (3, False)):
        ahead, still = (completions(root / name, step) for name in ("whole", "still"))
        assert (ahead == still) == as_without_learning, step
    assert completions(root / "in step", 1) == completions(root / "still", 1)
    assert completions(root / "in step", 2) != completions(root / "still", 2)


def test_the_correction_sees_the_older_weights(runs):
    gaps = {
        name: [row["policy/sampler_gap_mean"] for row in logged(runs[0] / name) if "reward" in row]
        for name in ("whole", "still")
    }
    assert len(gaps["whole"]) == 4
    assert min(gaps["whole"][1:]) > 2 * max(gaps["still"])  # of int8 alone


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_continues_with_what_it_had_sampled(runs, name):
    root, _ = runs
    assert not state_differences(root / "whole", root / name)
    assert not log_differences(root / "whole", root / name)
    assert state_differences(root / "whole", root / "in step")


def test_the_last_step_samples_nothing_ahead_so_the_end_is_fixed(runs):
    assert "loop.num_steps: 4 there, 5 now" in runs[1]
