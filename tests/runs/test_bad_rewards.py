"""Runs with reward functions that hang, raise and miscount: they finish, and count it all."""

from __future__ import annotations

import json
import sys

import pytest
from mistakes import TINY, make_model, refusal

from grpo_jax import train
from grpo_jax.run.append_log import read_jsonl

REWARDS = """
import os, time, zlib

FLAG = os.path.join(os.path.dirname(__file__), "away")

def _bad(completion):  # about one of ten
    return zlib.crc32(completion.encode()) % 10 == 0

def sleeps(completions, **columns):
    while any(map(_bad, completions)):
        time.sleep(1)
    return [1.0] * len(completions)

def raises(completions, **columns):
    return [1 / (not _bad(c)) for c in completions]

def too_few(completions, **columns):
    return [1.0 for c in completions if not _bad(c)]

def computes(completions, **columns):
    return [eval("9**9**9**9") if _bad(c) else 1.0 for c in completions]

def held_out(completions, trainer_state, **columns):  # fails there once step 2 was scored
    if trainer_state.max_steps == 0 and os.path.exists(FLAG):
        raise ConnectionError("the judge is away")
    if trainer_state.max_steps and trainer_state.global_step == 1:
        open(FLAG, "w").close()
    return [len(c) % 3 / 2 for c in completions]

def how_many(completions, **columns):
    return [float(_bad(c)) for c in completions]
"""
NAMES = ("sleeps", "raises", "computes")  # which fail for the bad completions, and for no other


@pytest.fixture
def importable(tmp_path, monkeypatch):
    (tmp_path / "awful_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("awful_rewards", None)


def test_a_run_survives_its_rewards(tmp_path, importable, one_device):
    model = make_model(tmp_path / "model")
    names = [f"awful_rewards:{name}" for name in (*NAMES, "too_few", "how_many")]
    folder = tmp_path / "run"
    status, message = refusal(
        train.main,
        [
            "--config", str(TINY), "--workdir", str(folder), f"--config.model.path={model}",
            f"--config.rewards.names={names}", "--config.rewards.weights=[1,1,1,1,0]",
            "--config.rewards.timeout_s=0.5", "--config.rewards.num_workers=2",
            "--config.rewards.start_timeout_s=6", "--config.rewards.max_failed_share=1.0",
            "--config.loop.num_steps=2", "--config.evaluation.num_problems=0",
        ],
    )  # fmt: skip
    assert status is None, message
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    rows = list(read_jsonl(folder / "metrics.jsonl"))
    bad = [round(16 * row["reward/how_many"]) for row in rows]
    assert len(bad) == 2 and sum(bad) > 0
    for name in NAMES:
        assert [row[f"rewards/failed/{name}"] for row in rows] == bad, name
        assert all(row[f"reward/{name}"] == 1.0 for row in rows)
    # A wrong number of values is that of a whole group of 4, in which one at least is bad.
    few = [int(row["rewards/failed/too_few"]) for row in rows]
    assert all(n % 4 == 0 and m / 4 <= n / 4 <= m for n, m in zip(few, bad))
    kinds = [
        [row.get(f"rewards/failed_by_{kind}", 0) for row in rows]
        for kind in ("timeout", "error", "values")
    ]
    assert kinds == [[2 * n for n in bad], bad, few]
    # Where one fails, the completion is unknown; a group with a bad one has no fourth reward.
    assert [row["rewards/unknown_share"] for row in rows] == [m / 16 for m in few]
    assert 0 < max(few) and min(few) < 16
    assert all(row["reward"] == 4.0 for row, m in zip(rows, few) if m < 16)
    assert all("reward" not in row for row, m in zip(rows, few) if m == 16)
    assert not any(row["rewards/unscored"] for row in rows)


def test_rewards_that_fail_in_an_evaluation_end_the_run_saved(tmp_path, importable, one_device):
    """After step 2 of 4; once they work, the same command goes on by that evaluation."""
    folder, flag = tmp_path / "run", tmp_path / "away"
    argv = [
        "--config", str(TINY), "--workdir", str(folder),
        f"--config.model.path={make_model(tmp_path / 'model')}",
        "--config.rewards.names=awful_rewards:held_out", "--config.rewards.weights=1.0",
        "--config.evaluation.every_steps=2", "--config.checkpoint.every_steps=0",
    ]  # fmt: skip
    status, message = refusal(train.main, argv)
    assert status == 1 and "The evaluation after step 2: 8 of 8 completions have no" in message
    assert "the judge is away" in message
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["8"]
    flag.unlink()
    status, message = refusal(train.main, argv)
    assert status is None, message
    rows = list(read_jsonl(folder / "metrics.jsonl"))
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 2, 4]
