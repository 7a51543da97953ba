"""Runs of conversations: what is learned from and logged, and resuming bit for bit.

The policy is untrained, so that it says anything; the environment answers with digits.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from driving import drive
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import make_model

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
MODULE = '''
import random

class Echo:
    """Says how long a turn was, and a random digit, until it was said three times."""

    def reset(self, prompt, **row):
        self.said, self.turns = [], []
        return str(random.randrange(10))

    turn_reward = 0.0

    def respond(self, messages):
        self.turns.append(messages[-1]["content"])
        self.turn_reward = sum(character.isdigit() for character in self.turns[-1]) / 10
        if len(self.said) == 2:
            return None
        self.said.append(f"{len(self.turns[-1])}{random.randrange(10)}")
        return self.said[-1]

    def get_reward(self):
        return sum(character.isdigit() for turn in self.turns for character in turn) / 10


def turns(environments, completions, **columns):
    assert len(environments) == len(completions) == 1
    return [len(environments[0].turns) / 10]
'''
OPTIONS = [
    "--config.environment.classes=('echo:Echo',)",
    "--config.environment.max_turns=3",
    "--config.environment.turn_tokens=5",
    "--config.environment.observation_tokens=8",
    "--config.rewards.names=('echo:turns',)",
    "--config.rewards.weights=(0.5,)",
    "--config.rollout.max_tokens=24",
    "--config.sft.num_steps=0",
]
STOPS = {
    "killed in the episodes": {"after": 10, "in": "rollout", "killed": True},
    "stopped between updates": {"after": 6},
}
UNEVALUATED = "--config.evaluation.num_problems=0"
OTHERS = {
    "slots": ["--config.rollout.num_slots=6", UNEVALUATED],
    "refill": ["--config.prompts.drop_equal_groups=True", "--config.loop.num_steps=2", UNEVALUATED],
    "eager": ["--config.environment.order=eager", "--config.loop.num_steps=2", UNEVALUATED],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    """The folder of all runs, and how each ended: first, and those of STOPS a second time."""
    root = tmp_path_factory.mktemp("echo")
    (root / "echo.py").write_text(MODULE)
    model = f"--config.model.path={make_model(root / 'model')}"
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = alone | {"PYTHONPATH": paths}

    def job(name, *more, **stop):
        argv = ["--config", str(HERE.parent / "helpers" / "tiny_config.py")]
        return {"argv": [*argv, "--workdir", str(root / name), model, *OPTIONS, *more]} | stop

    others = {name: job(name, *more) for name, more in {"whole": [], **OTHERS}.items()}
    credit = [
        UNEVALUATED,
        "--config.environment.turn_rewards=True",
        "--config.rewards.names=('echo:turns','environment:turn_rewards')",
        "--config.rewards.weights=(0.5,1.0)",
    ]
    others["turns"] = job("turns", *credit, after=1)
    stopped = {name: job(name, **stop) for name, stop in sorted(STOPS.items(), reverse=True)}
    first = drive([*others.values(), *stopped.values()], environment, -signal.SIGKILL)
    for name in STOPS:
        shutil.copytree(root / name, root / f"{name}, then")
    second = drive([job(name) for name in STOPS], environment)
    return root, dict(zip([*others, *stopped], first)), dict(zip(STOPS, second))


def steps(folder: Path) -> list[dict]:
    return [row for row in logged(folder) if "reward" in row]


def test_what_is_logged(runs):
    root, ends, _ = runs
    assert ends["whole"] == "finished"
    rows = steps(root / "whole")
    assert len(rows) == 4
    for row in rows:
        assert 2 <= row["environment/turns"] <= 3 and row["environment/observation_tokens"] > 2
        ended = {name: value for name, value in row.items() if "/ended/" in name}
        assert sum(ended.values()) == 1 and ended["environment/ended/done"] > 0
        assert row["reward"] == pytest.approx(row["reward/Echo"] + 0.5 * row["reward/turns"])
        assert row["reward/turns"] == pytest.approx(row["environment/turns"] / 10)
        assert row["policy/sampler_gap_max"] < 1e-4
    assert any("eval/reward/Echo" in row for row in logged(root / "whole"))


def test_only_the_policy_s_tokens_are_trained_on(runs):
    root, _, second = runs
    arrays = final_state(root / "stopped between updates, then", "experience")
    action_PGC, chosen_PGC = arrays["/action_PGC"], arrays["/rollouts/chosen_PGC"]
    np.testing.assert_array_equal(action_PGC, chosen_PGC)
    length_PG = arrays["/rollouts/length_PG"]
    said = length_PG - chosen_PGC.sum(-1)
    assert (said > 0).all() and (said < length_PG).all()
    assert second["stopped between updates"] == "finished"


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_continues_as_if_it_had_not_been(runs, name):
    root, _, second = runs
    assert second[name] == "finished"
    assert not state_differences(root / "whole", root / name)
    assert not log_differences(root / "whole", root / name)


def test_the_number_of_slots_changes_nothing(runs):
    root, ends, _ = runs
    assert ends["slots"] == "finished"
    own, other = steps(root / "slots"), steps(root / "whole")
    for name in ("reward", "environment/turns", "completion/length", "environment/calls"):
        assert [row[name] for row in own] == pytest.approx([row[name] for row in other]), name


def test_dynamic_sampling_and_eager_order(runs):
    root, ends, _ = runs
    assert ends["refill"] == ends["eager"] == "finished"
    assert {row["groups/equal_share"] for row in steps(root / "refill")} == {0}
    (first, *_), (whole, *_) = steps(root / "eager"), steps(root / "whole")
    for name in ("reward", "environment/turns", "completion/length"):
        assert first[name] == pytest.approx(whole[name])


def test_turns_have_advantages_of_their_own(runs):
    """Each turn earns its digits: later turns of an episode have less to go."""
    root, ends, _ = runs
    assert ends["turns"].startswith("Stopped by SIGTEST")
    arrays = final_state(root / "turns", "experience")
    advantage_PGC, chosen_PGC = arrays["/advantage"], arrays["/rollouts/chosen_PGC"]
    assert advantage_PGC.shape == chosen_PGC.shape
    several = [len(set(a[c].tolist())) for a, c in zip(advantage_PGC[0], chosen_PGC[0])]
    assert max(several) > 1
