"""A run that was stopped and continued in a new process against one that was left alone.

Bit for bit: parameters, optimizer state, every metric that is not a time, every sample.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from driving import drive
from kill_and_resume import final_state, log_differences, logged, state_differences

HERE = Path(__file__).parent
TINY = HERE.parent / "helpers" / "tiny_config.py"

# Stopped after so many updates (4 to a step: 2 minibatches, twice), or supervised steps.
STOPS = {
    "within the first step": ("update", 1),
    "between steps": ("update", 4),
    "within a step": ("update", 6),
    "in supervised training": ("sft", 2),
    "at the last supervised step": ("sft", 3),
    "before an evaluation": ("update", 8),
}
# Left while it was at something, after so many updates or supervised steps.
LEFT = {
    "in a supervised update": ("update", "sft", 1),
    "in the first rollout": ("rollout", "update", 0),
    "in the first update": ("update", "update", 0),
    "in rewards": ("rewards", "update", 4),
    "in an update": ("update", "update", 5),
    "in the last evaluation": ("evaluation", "update", 16),
}
ALL = [*STOPS, *LEFT]
SLOW = """
import os, time
from grpo_jax.rewards.exact import exact_answer

def slow(**columns):
    time.sleep(float(os.environ.get("SLEEP_S", "0")))
    return exact_answer(**columns)
"""
# Rewards that can be slowed down without changing the config, so that a run lasts.
SLOW_REWARD = [
    "--config.rewards.names=['slow_reward:slow','answer_format']",
    "--config.rewards.weights=[1.0,0.5]",
]


def _argv(folder: Path, *more: str) -> list[str]:
    return ["--config", str(TINY), "--workdir", str(folder), *SLOW_REWARD, *more]


def _model_of(folder: Path) -> str:
    """The option to begin with what a run has trained under supervision."""
    return f"--config.model.path={folder / 'bootstrap' / 'export'}"


@pytest.fixture(scope="module")
def slow_reward(tmp_path_factory, alone) -> dict[str, str]:
    """An environment in which SLOW_REWARD can be imported."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "slow_reward.py").write_text(SLOW)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return alone | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, slow_reward):
    """Folders of runs by name, how each ended, and for the stopped ones how they stood then.

    Two processes: the first runs, the second goes on with what was stopped.
    """
    root = tmp_path_factory.mktemp("runs")
    stopped = [
        {"argv": _argv(root / name), "of": kind, "after": count}
        for name, (kind, count) in STOPS.items()
    ]
    stopped += [
        {"argv": _argv(root / name), "in": phase, "of": kind, "after": count}
        for name, (phase, kind, count) in LEFT.items()
    ]
    longer = ["--config.loop.num_steps=6", _model_of(root / "whole")]
    alone = [{"argv": _argv(root / "whole")}, {"argv": _argv(root / "longer", *longer)}]
    first = drive(alone + stopped, slow_reward)
    for name in ALL:
        shutil.copytree(root / name, root / f"{name}, then")
    shutil.copytree(root / "whole", root / "extended")
    changed = _argv(root / "whole", "--config.optim.learning_rate=0.5")
    second = drive(
        [{"argv": _argv(root / name)} for name in ALL]
        + [{"argv": _argv(root / "extended", "--config.loop.num_steps=6")}, {"argv": changed}],
        slow_reward,
    )
    ends = dict(zip(["whole", "longer", *ALL], first))
    return root, ends, dict(zip([*ALL, "extended", "changed"], second))


@pytest.mark.parametrize("name", ALL)
def test_a_stopped_run_continues_as_if_it_had_not_been(runs, name):
    root, first, second = runs
    assert first["whole"] == "finished" and second[name] == "finished"
    assert first[name].startswith("Stopped by SIGTEST "), first[name]
    assert not state_differences(root / "whole", root / name)
    assert not log_differences(root / "whole", root / name)
    sft, weights = "bootstrap", Path("bootstrap", "export", "model.safetensors")
    assert (root / "whole" / weights).read_bytes() == (root / name / weights).read_bytes()
    assert not log_differences(root / "whole" / sft, root / name / sft)


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_comes_where_it_was_asked_for(runs, name):
    """Without this, runs that stop at their end would pass the comparison."""
    root, first, _ = runs
    kind, count = STOPS[name]
    then = root / f"{name}, then"
    if kind == "sft":
        part = then / "bootstrap" if count < 3 else None
        assert "supervised" in first[name]
    else:
        part = then
        middle = f"after {count % 4} of its updates" if count % 4 else f"step {count // 4};"
        assert middle in first[name]
    if part:
        assert int(final_state(part)["/num_updates"]) == count
        steps = {row["step"] for row in logged(part) if "reward" in row or "sft/loss" in row}
        done = count if kind == "sft" else count // 4 - ("evaluation" in name)  # with their lines
        assert steps == set(range(1, 1 + done))


@pytest.mark.parametrize("name", LEFT)
def test_a_run_that_does_not_hear_is_left_saved(runs, name):
    """All that was computed before the phase is there; the phase itself is computed again."""
    root, first, _ = runs
    phase, kind, count = LEFT[name]
    assert first[name].endswith("(status 75)")
    then = root / f"{name}, then" / ("bootstrap" if kind == "sft" else "")
    assert int(final_state(then)["/num_updates"]) == count
    steps = count if kind == "sft" else count // 4 - (phase == "evaluation")  # with their lines
    written = {row["step"] for row in logged(then) if "reward" in row or "sft/loss" in row}
    assert written == set(range(1, 1 + steps))


def test_every_step_is_logged_once(runs):
    rows = logged(runs[0] / "within a step")
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4]
    evaluated = [row["step"] for row in rows if "eval/reward" in row]
    assert evaluated == [0, 2, 4]  # before the first step, and after every second


def test_comparison_sees_another_run(runs):
    """Runs that do differ are told apart, by their weights and by their logs."""
    root = runs[0]
    assert any("params" in name for name in state_differences(root / "whole", root / "longer"))
    assert log_differences(root / "whole", root / "longer")


def test_more_steps_continue_a_finished_run(runs):
    root, _, second = runs
    assert second["extended"] == "finished"
    assert not state_differences(root / "longer", root / "extended")
    summary = json.loads((root / "extended" / "summary.json").read_text())
    assert summary["steps"] == 6


def test_a_changed_config_is_refused(runs):
    end = runs[2]["changed"]
    assert end.startswith("error: --workdir")
    assert "optim.learning_rate: 0.001 there, 0.5 now" in end


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path, slow_reward):
    """kill_and_resume.py with the tiny config: killed in the first half, stopped in the second.

    SIGTERM saves and ends the program with status 75; the same command goes on.
    """
    more = ["--config.loop.num_steps=12", "--config.checkpoint.every_steps=4", *SLOW_REWARD]
    root = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_and_resume.py"), "--config", str(TINY), "--kills=2",
         "--stop", "--root", str(root), *more],
        env=slow_reward | {"SLEEP_S": "0.05"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EQUAL bit for bit" in done.stdout and done.stdout.count("| step") >= 1, done.stdout
    said = (root / "killed.log").read_text()
    stopped, _, then = said.partition("Stopped by SIGTERM at step")
    assert "continues" in then and "Continuing" in then and "Run finished" not in stopped, said
