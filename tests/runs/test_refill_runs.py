"""Runs that choose their prompts: dynamic sampling, and prompts by measured pass rates.

What is learned from, what is counted, and resuming bit for bit. The reward is right for about one
completion of three, so that many groups of four are equal.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from driving import drive
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import make_model

from grpo_jax.config import loading
from grpo_jax.data.prompts import prompt_indices
from grpo_jax.setup.data import load_problems

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
REWARDS = """
def first_digit(completions, **columns):
    return [float(c[:1] in "0123") for c in completions]

def never(completions, **columns):
    return [0.0] * len(completions)
"""
OPTIONS = ["--config.rewards.weights=[1.0]", "--config.evaluation.num_problems=0"]
REFILL = ["--config.prompts.drop_equal_groups=True", "--config.prompts.per_draw=2"]
# Of eight problems, and a step ahead: the rates are then those of the step before the last.
RATES = [
    "--config.data.subset=('3:7',0,11,12,13)",
    "--config.prompts.outside_weight=0.05",
    "--config.prompts.replay_share=0.25",
    "--config.prompts.high_rate=0.25",
    "--config.loop.async_rollouts=True",
    "--config.rollout_correction.level=token",
    "--config.prompts.oversample=1.5",
]
# Four updates a step. Step 2 is whole after 8; a checkpoint is due after steps 2 and 4.
STOPS = {
    "within a step": {"after": 6},
    "between steps": {"after": 12},
    "in rewards": {"after": 4, "in": "rewards"},
    "in a later draw": {"after": 8, "in": "draw"},
    "by rates, within a step": {"after": 6},
    "by rates, between steps": {"after": 12},
    "killed in a later draw": {"after": 12, "in": "draw", "killed": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    """The folder of all runs, and how each ended: first, and those of STOPS a second time."""
    root = tmp_path_factory.mktemp("refill")
    (root / "refill_rewards.py").write_text(REWARDS)
    model = f"--config.model.path={make_model(root / 'model')}"
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = alone | {"PYTHONPATH": paths}

    def job(name, *more, reward="first_digit", **stop):
        argv = ["--config", str(HERE.parent / "helpers" / "tiny_config.py")]
        argv += ["--workdir", str(root / name), model, *OPTIONS]
        argv += RATES if name.startswith("by rates") else REFILL
        return {
            "argv": [*argv, f"--config.rewards.names=['refill_rewards:{reward}']", *more]
        } | stop

    never = ["--config.prompts.max_draws=3", "--config.loop.num_steps=1"]
    others = {
        "whole": job("whole"),
        "by rates": job("by rates"),
        "never": job("never", *never, reward="never"),
        "fill": job("fill", *never, "--config.prompts.if_short=fill", reward="never"),
    }
    stopped = {name: job(name, **stop) for name, stop in STOPS.items()}
    first = drive([*others.values(), *stopped.values()], environment, -signal.SIGKILL)
    for name in STOPS:
        shutil.copytree(root / name, root / f"{name}, then")
    second = drive([job(name) for name in STOPS], environment)
    return root, dict(zip([*others, *STOPS], first)), dict(zip(STOPS, second))


def steps(folder: Path) -> list[dict]:
    return [row for row in logged(folder) if "reward" in row]


def test_the_batch_is_full_of_groups_with_a_gradient(runs):
    root, ends, _ = runs
    assert ends["whole"] == "finished"
    rows = steps(root / "whole")
    assert len(rows) == 4 and {row["groups/equal_share"] for row in rows} == {0}
    for row in rows:
        assert row["groups/drawn"] == 2 * row["groups/draws"]
        assert 4 <= row["groups/drawn"] - row["groups/dropped"] <= 5  # at most one is left over
    assert sum(row["groups/dropped"] for row in rows) > 0
    advantage_PG = final_state(root / "within a step, then", "experience")["/advantage"]
    assert advantage_PG.shape == (4, 4) and (np.abs(advantage_PG).max(1) > 0.1).all()


def test_all_that_was_sampled_is_counted(runs):
    root, _, _ = runs
    tokens = 0
    for row in steps(root / "whole"):
        tokens += row["groups/drawn"] * 4 * row["completion/length"]
        assert row["tokens/generated"] == pytest.approx(tokens)


def test_every_draw_has_its_own_prompts_and_none_is_left_out(runs):
    root, _, _ = runs
    rows = steps(root / "whole")
    problems = [sample["prompt"] for sample in logged(root / "whole", "samples.jsonl")]
    train, _ = load_problems(loading.load(str(HERE.parent / "helpers" / "tiny_config.py"), []))
    draw = 0
    for number, row in enumerate(rows):
        following = draw + int(row["groups/draws"])
        index = np.concatenate(
            [prompt_indices(0, d, len(train), 2) for d in range(draw, following)]
        )
        shown = {sample for sample in problems[4 * number : 4 * number + 4]}
        assert shown <= {train[i].prompt for i in index}
        draw = following
    assert draw > 2 * len(rows)  # a step needs two draws at least


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_continues_as_if_it_had_not_been(runs, name):
    root, first, second = runs
    assert second[name] == "finished"
    whole = root / ("by rates" if name.startswith("by rates") else "whole")
    assert not state_differences(whole, root / name)
    assert not log_differences(whole, root / name)
    if name in first:
        assert first[name].startswith("Stopped by SIGTEST "), first[name]
    else:  # of step 2, 8 updates, there was a checkpoint, or on a slow disk none yet
        there = (root / f"{name}, then" / "checkpoints").iterdir()
        assert "killed" in name and {p.name for p in there if p.name.isdigit()} <= {"8"}


def test_a_run_whose_rewards_never_differ_ends(runs):
    root, ends, _ = runs
    assert ends["never"].startswith(
        "error: Step 1: prompts.max_draws = 3 draws of 2 prompts gave 0"
    )
    for part in ("batch.prompts = 4", "the other 6", "between 0 and 0", "prompts.if_short"):
        assert part in ends["never"]
    assert not steps(root / "never")


def test_a_batch_that_is_short_is_filled_where_asked(runs):
    root, ends, _ = runs
    (row,) = steps(root / "fill")
    assert ends["fill"] == "finished"
    assert (row["groups/equal_share"], row["groups/draws"], row["groups/dropped"]) == (1, 3, 6)


def test_what_over_sampling_gives_up_is_counted(runs):
    root, _, _ = runs
    tokens = 0
    for row in steps(root / "by rates"):
        assert row["groups/given_up"] == 2  # of six
        tokens += 16 * row["completion/length"] / (1 - row["tokens/given_up_share"])
        assert row["tokens/generated"] == pytest.approx(tokens)
    facts = root / "by rates" / "checkpoints" / "16" / "facts" / "metadata"
    assert json.loads(facts.read_text())["state"]["prompts"] == 4 * 6


def test_rates_are_measured_and_decide_what_is_asked(runs):
    root, ends, _ = runs
    rows = steps(root / "by rates")
    assert ends["by rates"] == "finished" and len(rows) == 4
    shares = [row["prompts/unseen_share"] for row in rows]
    # Each step asks four of the eight problems.
    assert shares[0] == 0.5 and shares == sorted(shares, reverse=True)
    facts = json.loads(
        (root / "by rates" / "checkpoints" / "16" / "facts" / "metadata").read_text()
    )
    rates = facts["state"]["pass_rates"]
    assert (rates["number"], sum(rates["times"])) == (8, 16)
    assert set(np.array(rates["rates"]) * 4 % 0.0625) == {
        0
    }  # means of quarters, halved at most 4 x
    assert sum(row["prompts/replayed_share"] for row in rows) > 0
