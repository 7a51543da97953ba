"""A run of so many epochs has the steps that they take."""

from __future__ import annotations

import pytest
from mistakes import TINY, make_model, refusal

from grpo_jax import train
from grpo_jax.config import derived, loading, record
from grpo_jax.config.dotted import assign
from grpo_jax.planning import fit
from grpo_jax.setup import run_folder
from grpo_jax.trainers import given, grpo_run
from grpo_jax.trainers.sft import SFT

EPOCHS = [
    "--config.loop.num_epochs=1.5",
    "--config.batch.prompts=16",
    "--config.optim.schedule=linear",
]


@pytest.mark.parametrize(
    ("epochs", "problems", "steps"),
    [
        (1.0, 40, 3),  # of 16, 16 and 8, which the next epoch fills up
        (1.0, 48, 3),
        (2.0, 40, 5),
        (0.1, 160, 1),
        (0.1, 480, 3),
        (0.01, 40, 1),
        (0.0, 40, 4),  # loop.num_steps
    ],
)
def test_steps_of_epochs(epochs, problems, steps):
    config = loading.load(str(TINY), [f"--config.loop.num_epochs={epochs}", EPOCHS[1]])
    assert derived.num_steps(config, problems) == steps


def test_the_learning_rate_ends_with_the_last_epoch(tmp_path, capsys):
    model = make_model(tmp_path / "model")
    options = [*EPOCHS, "--config.loop.num_epochs=2", f"--config.model.path={model}"]
    config = loading.load(str(TINY), options)  # whose own loop.num_steps is 4
    run = grpo_run.build(config, tmp_path / "run", str(model), fit.of_run)
    run.rewards.close()

    assert run.course.num_steps == run.config.loop.num_steps == 5  # 80 prompts
    assert "5 steps, which ask each problem 2.00 times" in capsys.readouterr().out
    updates = 5 * run.course.updates
    last, after = (float(run.learning_rate(n)) for n in (updates - 1, updates))
    assert last == pytest.approx(config.optim.learning_rate / updates, rel=1e-4)
    assert after == pytest.approx(0.0, abs=1e-9)


def test_worked_solutions_are_imitated_for_so_many_epochs(tmp_path, capsys):
    options = ["--config.sft.num_epochs=1.5", "--config.sft.num_steps=0", "--config.sft.batch=16"]
    config = loading.load(str(TINY), options)
    run_folder.open_for(config, tmp_path)
    run, _ = given.build(SFT, config, tmp_path, evaluates=False)

    assert run.course.num_steps == 4  # 60 solutions
    assert "1.5 epochs are 4 updates of 16" in capsys.readouterr().out
    assert derived.num_supervised_steps(loading.load(str(TINY), []), 40) == 3  # sft.num_steps
    last, after = (float(run.learning_rate(n)) for n in (3, 4))
    assert last > 0.1 * config.sft.learning_rate
    assert after == pytest.approx(0.0, abs=1e-9)


def test_a_run_that_goes_on_has_the_same_epochs_where_its_schedule_ends_with_them(tmp_path):
    epochs, steps = loading.load(str(TINY), EPOCHS), loading.load(str(TINY), EPOCHS[1:])
    settled = grpo_run.settled(epochs, 40)
    assert record.binding(settled) == record.binding(epochs)
    assert record.changes(record.binding(epochs), settled) == {}
    assert record.changes(record.binding(epochs), steps) == {
        "loop.num_epochs": (1.5, 0.0), "loop.num_steps": (0, 4),
    }  # fmt: skip
    constant = loading.load(str(TINY), [])
    more = constant.copy_and_resolve_references().unlock()
    assign(more, "loop.num_epochs", 3)
    assert record.changes(record.binding(constant), more) == {}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--config.optim.warmup_steps=20", "leaves nothing of the 16 updates"),
        ("--config.profile.steps=(3,5)", "from 1 to loop.num_steps = 4"),
    ],
)
def test_what_asks_for_more_steps_is_refused(tmp_path, option, words):
    """Of a new model before it is trained on worked solutions."""
    argv = ["--config", str(TINY), "--workdir", str(tmp_path / "run"), *EPOCHS, option]
    status, message = refusal(train.main, argv)
    assert status == 1 and words in message
    assert not (tmp_path / "run" / "bootstrap").exists()
