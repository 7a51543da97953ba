"""Runs whose objective changes: adaptive coefficients, a moving reference, chosen tokens.

Greedy completions are the baseline: of a step that was left while it waited for rewards there are
none in the checkpoint. A run that was stopped and continued is, bit for bit, one that was left
alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from kill_and_resume import arrays_of, log_differences, logged, state_differences

HERE = Path(__file__).parent
HELPERS = HERE.parent / "helpers"
TARGET, HORIZON = 0.02, 20  # 16 completions a step
OPTIONS = [
    f"--config.algorithm.kl_target={TARGET}",
    f"--config.algorithm.kl_horizon={HORIZON}",
    "--config.algorithm.entropy_target=5.0",  # above all that is measured
    "--config.algorithm.reference_refresh_steps=2",
    "--config.algorithm.top_entropy_share=0.5",
    "--config.algorithm.baseline=greedy",
    "--config.algorithm.scale_by=none",
    "--config.optim.learning_rate=0.01",
    "--config.evaluation.num_problems=0",
    "--config.logging.tensorboard=False",
    "--config.checkpoint.export=False",
]
# Stopped after so many updates, 4 to a step; the reference is refreshed after steps 2 and 4.
STOPS = {
    "within step 2": {"after": 6},
    "within step 3": {"after": 10},
    "in rewards of step 4": {"after": 12, "in": "rewards"},
}
IN_HOST_MEMORY = ["--config.model.offload_reference=True"]  # binds nothing and changes nothing


@pytest.fixture(scope="module")
def runs(tmp_path_factory, drive_here) -> tuple[Path, dict[str, set[str]]]:
    """The folder of the runs, and the items of the checkpoint of each stopped one."""
    root = tmp_path_factory.mktemp("changing")

    def job(name: str, **stop) -> dict:
        argv = ["--config", str(HELPERS / "tiny_config.py"), "--workdir", str(root / name)]
        more = [] if name == "whole" else [f"--config.model.path={root / 'whole/bootstrap/export'}"]
        more += IN_HOST_MEMORY if name == "within step 3" else []
        return {"argv": [*argv, *OPTIONS, *more], **stop}

    ends = drive_here([job("whole"), *(job(name, **stop) for name, stop in STOPS.items())])
    assert ends[0] == "finished" and all(end.startswith("Stopped") for end in ends[1:]), ends
    items = {}
    for name, stop in STOPS.items():
        folder = root / name / "checkpoints" / str(stop["after"])
        items[name] = {item.name for item in folder.iterdir() if item.is_dir()}
    assert drive_here([job(name) for name in STOPS]) == ["finished"] * len(STOPS)
    return root, items


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(runs, name):
    root, items = runs
    whole, other = root / "whole", root / name
    assert not state_differences(whole, other) and not log_differences(whole, other)
    assert ("reference" in items[name]) == (name != "within step 2")  # once it was refreshed
    left, right = (arrays_of(run / "checkpoints" / "16", "reference") for run in (whole, other))
    assert left.keys() == right.keys() and left
    assert all(left[n].tobytes() == right[n].tobytes() for n in left)


def test_the_reference_moves_towards_the_policy(runs):
    checkpoints = runs[0] / "whole" / "checkpoints"
    before, after = (arrays_of(checkpoints / n, "reference") for n in ("8", "16"))
    policy = arrays_of(checkpoints / "16")
    for name, value in after.items():
        want = 0.6 * np.float64(policy[f"/params{name}"]) + 0.4 * np.float64(before[name])
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-7)
    moved = [np.abs(after[name] - before[name]).max() for name in after]
    assert min(moved) > 1e-4
    # The policy of the first update of step 3 is where that of step 2 ended.
    kl = [row["policy/kl"] for row in logged(runs[0] / "whole")]
    assert kl[2] < kl[1]


def test_the_coefficients_follow_the_metrics_of_each_step(runs):
    rows = logged(runs[0] / "whole")
    kl_coef = 0.05
    for row in rows:
        np.testing.assert_allclose(row["policy/kl_coef"], kl_coef, rtol=1e-12)
        kl_coef *= 1 + np.clip(row["policy/kl"] / TARGET - 1, -0.2, 0.2) * 16 / HORIZON
    assert len({row["policy/kl_coef"] for row in rows}) == 4
    found = [row["policy/entropy_coef"] for row in rows]
    np.testing.assert_allclose(found, [0, 0.005, 0.01, 0.015], rtol=1e-12)


def test_a_new_coefficient_compiles_nothing(runs):
    """Programs are compiled in the first steps alone, and when the reference is first refreshed."""
    file = runs[0] / "whole" / "metrics.jsonl"
    programs = [json.loads(line)["programs"] for line in file.read_text().splitlines()]
    assert programs[3] == programs[2]
