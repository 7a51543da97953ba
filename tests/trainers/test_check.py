"""`train --check`: what a run would be, without a run."""

from __future__ import annotations

import json

import pytest
from mistakes import TINY, make_model, refusal

from grpo_jax import train
from grpo_jax.config import loading, record
from grpo_jax.planning import fit
from grpo_jax.planning import plan as plan_lib
from grpo_jax.planning.plan import Plan
from grpo_jax.trainers import check

SMALL = [
    "--config.batch.prompts=8",
    "--config.batch.minibatches=1",
    "--config.evaluation.num_problems=4",
]


@pytest.fixture
def one_plan(monkeypatch) -> list[Plan]:
    """Plans that were made, which compile the gradient alone."""
    made, whole = [], plan_lib.plan

    def plan(*args, **kwargs):
        made.append(whole(*args, **kwargs, only=lambda name: name == "gradient"))
        return made[-1]

    monkeypatch.setattr(plan_lib, "plan", plan)
    return made


def checked(capsys, folder, *more: str) -> str:
    train.main(["--config", str(TINY), "--workdir", str(folder), "--check", *SMALL, *more])
    return capsys.readouterr().out


def test_a_check_says_what_the_run_would_be_and_writes_nothing(tmp_path, capsys, one_plan):
    told = checked(capsys, tmp_path / "run")

    assert "c.batch.prompts = 8" in told and "c.optim.schedule" not in told
    assert "Problems: 40 to train on, 4 held out" in told
    assert "32 completions, at most 256 sampled" in told
    assert "4 steps, which ask 32 of the 40 problems" in told
    assert "answer_format 1.000" in told and "worked solutions" in told
    assert "begins" in told and told.endswith("Nothing speaks against this run.\n")
    (plan,) = one_plan
    assert plan.mesh["data"] == 8
    assert f"Memory: {plan.peak / 2**30:,.2f} GiB of each device" in told
    assert not list(tmp_path.iterdir())


def test_tokens_of_prompts_and_of_a_step(tmp_path):
    from grpo_jax.data import tasks
    from grpo_jax.setup import model
    from grpo_jax.trainers import grpo_run

    config = loading.load(str(TINY), SMALL)
    new = lambda: model.new(config.model, tasks.load("arithmetic").make_tokenizer())  # noqa: E731
    found = grpo_run.read(config, new, lambda: check.date_of(config, tmp_path))
    lengths = sorted(map(len, found.train.prompt_ids))

    prompts, step = check._sizes(config, found)

    assert prompts.startswith(f"Tokens of a prompt: shortest {lengths[0]}, ")
    assert prompts.endswith(f", longest {lengths[-1]}")
    assert step.endswith(f"{32 * 8 + 8 * lengths[-1]} trained on")


def test_a_reward_that_fails_is_told(tmp_path, capsys, one_plan):
    (tmp_path / "check_rewards.py").write_text(
        "def broken(prompts, completions, **columns):\n    raise KeyError('gold')\n"
    )
    config = tmp_path / "c.py"
    config.write_text(
        TINY.read_text().replace("    return c", "    c.rewards.names = ('check_rewards:broken',)\n"
                                 "    c.rewards.weights = (1.0,)\n    return c")
    )  # fmt: skip
    train.main(["--config", str(config), "--workdir", str(tmp_path / "run"), "--check", *SMALL])
    told = capsys.readouterr().out

    assert "warning: a reward fails at" in told and "KeyError" in told
    assert "the mean: broken none" in told


def test_a_step_that_does_not_fit_is_refused(tmp_path, monkeypatch, one_plan):
    monkeypatch.setattr(fit, "limit_of_all", lambda: 1000.0)
    argv = ["--config", str(TINY), "--workdir", str(tmp_path / "run"), "--check", *SMALL]

    status, message = refusal(train.main, argv)

    assert status == 1 and "a step needs" in message and "batch.microbatch" in message


def test_a_workdir_that_holds_another_run_is_refused(tmp_path, capsys, one_plan):
    folder, config = tmp_path / "run", loading.load(str(TINY), SMALL)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record.new(config)))
    argv = ["--config", str(TINY), "--workdir", str(folder), "--check", *SMALL]

    assert "goes on" in checked(capsys, folder)
    before = (folder / "config.json").read_text()
    _, message = refusal(train.main, [*argv, "--config.batch.group=8"])
    assert "batch.group: 4 there, 8 now" in message
    assert (folder / "config.json").read_text() == before


def test_a_workdir_whose_data_changed_is_refused(tmp_path, one_plan):
    model, folder, rows = make_model(tmp_path / "model"), tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "answer": 2}\n' * 4)
    argv = ["--config", str(TINY), "--workdir", str(folder), "--check", *SMALL]
    argv += [f"--config.model.path={model}", "--config.data.task=", f"--config.data.path={rows}"]
    config = loading.load(str(TINY), argv[5:])
    folder.mkdir()
    sums = {"training problems": {"number": 4, "prompts": "another", "columns": "one"}}
    (folder / "config.json").write_text(json.dumps(record.new(config) | {"read": sums}))

    _, message = refusal(train.main, argv)
    assert "read something else" in message and "--config.checkpoint.accept_changes" in message
