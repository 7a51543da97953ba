"""Numbers that are planted in a run: what becomes of them, and of the run after them.

It equals, bit for bit, one in which nothing was planted and what was undone was left out.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import TINY, make_model, refusal

from grpo_jax import train
from grpo_jax.learner.experience import Prepare
from grpo_jax.trainers import grpo_run
from grpo_jax.trainers.guards import Guards
from grpo_jax.trainers.run_state import RunState

REWARD = """
import os

def planted(completions, trainer_state, **columns):
    if trainer_state.global_step == 1 and os.environ.get("PLANTED"):
        return [float(os.environ["PLANTED"])] * len(completions)
    return [len(c) % 3 / 2 for c in completions]
"""
OPTIONS = [
    "--config.rewards.names=planted_reward:planted",
    "--config.rewards.weights=1.0",
    "--config.rewards.max_failed_share=0.5",
    "--config.guards.failed_rewards=skip",
    "--config.evaluation.num_problems=0",
    "--config.loop.num_steps=3",
    "--config.checkpoint.export=False",
    "--config.logging.tensorboard=False",
]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "planted_reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture
def runs(tmp_path, model, rewards, monkeypatch, one_device):
    """A function that runs a job of a name, and gives its folder."""
    monkeypatch.syspath_prepend(rewards)

    def run(name: str, *more: str) -> Path:
        argv = ["--config", str(TINY), "--workdir", str(tmp_path / name), *OPTIONS]
        status, message = refusal(train.main, [*argv, f"--config.model.path={model}", *more])
        assert status is None, message
        return tmp_path / name

    yield run
    sys.modules.pop("planted_reward", None)


def test_a_step_of_bad_numbers_is_as_if_it_had_been_left_out(runs, monkeypatch):
    """In the rewards, or behind them in the gradient: of step 2 of 3 nothing is learned."""
    more = ["--config.optim.schedule=linear"]
    with monkeypatch.context() as here:
        here.setenv("PLANTED", "nan")
        reward = runs("reward", *more)
    with monkeypatch.context() as here:
        prepare, count = Prepare.__call__, iter(range(10))

        def poisoned(*args, **more):
            experience = prepare(*args, **more)
            factor = jnp.inf if next(count) == 1 else 1.0
            return experience.replace(advantage=experience.advantage * factor)

        here.setattr(Prepare, "__call__", poisoned)
        gradient = runs("gradient", *more)
    with monkeypatch.context() as here:

        def look(guards, step, values):
            guards.skips_rollout = step == 2

        here.setattr(Guards, "check_rollout", look)
        left_out = runs("left out", *more)

    for folder in (reward, gradient):
        assert not state_differences(left_out, folder)
        assert [log_differences(left_out, folder)[0].split(":")[1]] == [" step 2"]
    state = final_state(left_out)
    assert int(state["/num_updates"]) == 12 and int(state["/num_skipped"]) == 4
    made = [int(value) for name, value in state.items() if name.endswith("/count")]
    assert made and set(made) == {8}
    rows = logged(reward)
    # From 1e-3 to 0 in 12 updates: the rate of the 4th is that of its 3/12, and so for the 8th.
    rates = [row["policy/learning_rate"] for row in rows]
    np.testing.assert_allclose(rates, [9e-3 / 12, 9e-3 / 12, 5e-3 / 12], rtol=1e-6)
    assert [row["rewards/failed/planted"] for row in rows] == [0, 16, 0]
    assert [row["policy/skipped_updates"] for row in rows] == [0, 4, 4]
    assert "policy/loss" not in rows[1] and logged(gradient)[1]["policy/loss"] is None


@pytest.mark.slow
def test_a_bad_weight_is_rolled_back(runs, monkeypatch):
    """It comes in step 3; of step 2 there is a checkpoint. Steps 3 to 5 then have other prompts."""
    more = ["guards.after_skips=roll_back", "guards.max_skipped=1", "loop.num_steps=5"]
    more = [f"--config.{option}" for option in more]
    build, count = grpo_run.build, iter(range(100))

    def planting(*args):
        parts = build(*args)

        def update(state, experience, index, before_donating, frozen):
            if next(count) == 8:
                kernel = state.params["norm"]["scale"]
                state.params["norm"]["scale"] = kernel.at[0].set(jnp.nan)
            return parts.update(state, experience, index, before_donating, frozen)

        return dataclasses.replace(parts, update=update)

    with monkeypatch.context() as here:
        here.setattr(grpo_run, "build", planting)
        planted = runs("planted", *more)
    summary = json.loads((planted / "summary.json").read_text())
    assert summary["roll_backs"] == 1 and summary["skipped_updates"] == 0
    assert [row["step"] for row in logged(planted)] == [1, 2, 3, 4, 5]
    with monkeypatch.context() as here:
        here.setattr(RunState, "draw_of", lambda at, step: step + (step >= 2))
        without = runs("without", *more)
    assert not state_differences(planted, without)
    assert log_differences(planted, without) == [
        f"metrics.jsonl: step {n}: guards/roll_backs, tokens/generated" for n in (3, 4, 5)
    ]
    plain = runs("plain", *more)
    assert "/params/norm/scale" in state_differences(planted, plain)


# --- Roll-backs of runs that are stopped ----------------------------------------------------------

CLIMBING = [
    "--config.optim.learning_rate=0.003",
    "--config.loop.num_steps=9",
    "--config.guards.kl=roll_back",
    "--config.guards.kl_max=0.05",
    "--config.guards.max_roll_backs=2",
    "--config.checkpoint.keep=1",
    "--config.evaluation.num_problems=0",
]
STOPS = (5, 12, 9)  # after so many updates, 4 to a step


@pytest.fixture(scope="module")
def ends(tmp_path_factory, drive_here, model) -> tuple[Path, dict[str, str]]:
    """The folder of runs that are left alone or stopped, by their way, and how they ended."""
    root = tmp_path_factory.mktemp("rolled")
    a_step_ahead = ["--config.loop.async_rollouts=True", "--config.rollout_correction.level=token"]
    more = {"in step": [], "a step ahead": a_step_ahead}

    def job(way, name, **stop):
        argv = ["--config", str(TINY), "--workdir", str(root / way / name), *CLIMBING]
        return {"argv": [*argv, f"--config.model.path={model}", *more[way]], **stop}

    def stopped(way):
        return [job(way, "stopped", of="update", after=after) for after in STOPS]

    first = [each for way in more for each in (job(way, "whole"), stopped(way)[0])]
    then = [each for way in more for each in (*stopped(way)[1:], job(way, "stopped"))]
    found = [iter(drive_here(jobs)) for jobs in (first, then)]
    return root, {way: [*islice(found[0], 2), *islice(found[1], 3)] for way in more}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in step", "a step ahead"])
def test_a_stopped_run_rolls_back_as_the_whole_one(ends, way):
    root, (whole, *stops, last) = ends[0] / way, ends[1][way]
    assert all(end.startswith("Stopped by SIGTEST") for end in stops), stops
    assert "rolled back guards.max_roll_backs = 2 times already" in whole
    assert last.replace("/stopped/", "/whole/") == whole
    for checkpoint in (root / "stopped" / "checkpoints").glob("[0-9]*"):
        if int(checkpoint.name) % 8:  # of a stop, and the run did not come to the next one due
            shutil.rmtree(checkpoint)
    assert not state_differences(root / "whole", root / "stopped")
    assert not log_differences(root / "whole", root / "stopped")
