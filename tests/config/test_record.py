"""What a run's folder records of its config, read by another version and by another command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from valid_config import valid

import grpo_jax
from grpo_jax.config import options, record
from grpo_jax.setup.run_folder import open_for


def _config(accept=(), **optim):
    config = options.default()
    config.data.task = "arithmetic"
    config.optim.update(optim)
    config.checkpoint.accept_changes = accept
    return config


@pytest.fixture
def run(tmp_path):
    """The folder of a run with results."""
    open_for(_config(), tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    return tmp_path


def _edit(folder, change) -> None:
    found = json.loads((folder / "config.json").read_text())
    change(found)
    (folder / "config.json").write_text(json.dumps(found))


def test_the_version_is_recorded(run):
    assert record.read(run / "config.json")["version"] == grpo_jax.__version__


def test_an_option_that_a_record_lacks_has_its_default(run):
    """As one that was written before there was that option."""
    _edit(run, lambda found: found["binding"].pop("loop.async_rollouts"))
    open_for(_config(), run)
    _edit(run, lambda found: found["binding"].pop("optim.beta1"))
    with pytest.raises(ValueError, match=r"optim.beta1: 0.9 there, 0.5 now"):
        open_for(_config(beta1=0.5), run)


def test_an_option_that_is_no_more_is_named(run):
    _edit(run, lambda found: found["binding"].update({"optim.momentum": 0.7}))
    with pytest.raises(ValueError, match=r"optim.momentum: 0.7 there, None now"):
        open_for(_config(), run)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"binding": 3, "options": {}}', "\xff"])
def test_a_damaged_record_is_one_message(run, text):
    (run / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config.json does not hold .* Put the file back, or"):
        open_for(_config(), run)
    (run / "config.json").unlink()  # the remedy
    open_for(_config(), run)


def test_a_change_is_accepted_by_name_and_noted(run):
    with pytest.raises(ValueError) as info:
        open_for(_config(learning_rate=0.5, beta1=0.8), run)
    told = str(info.value)
    assert """accept_changes="('optim.beta1','optim.learning_rate')".""" in told
    with pytest.raises(ValueError, match=r"\(optim.beta1: 0.9 there, 0.8 now\).*changes=opt"):
        open_for(_config(("optim.learning_rate",), learning_rate=0.5, beta1=0.8), run)
    assert record.accepted(run) == ()
    open_for(_config(("optim.learning_rate",), learning_rate=0.5), run)
    noted = record.read(run / "config.json")["changes"]
    assert [(n["option"], n["from"], n["to"]) for n in noted] == [
        ("optim.learning_rate", 1e-6, 0.5)
    ]
    open_for(_config(learning_rate=0.5), run)  # from now on it is the run's
    open_for(_config(("optim.learning_rate",), learning_rate=0.25), run)
    assert record.accepted(run) == ("optim.learning_rate",) * 2


def test_more_steps_of_a_decay_are_accepted(run):
    def decaying(num_steps, accept=()):
        config = _config(accept, schedule="linear")
        config.loop.num_steps = num_steps
        return config

    open_for(decaying(8, ("optim.schedule", "loop.num_steps")), run)
    with pytest.raises(ValueError, match=r"loop.num_steps: 8 there, 9 now.*=loop.num_steps\."):
        open_for(decaying(9), run)
    open_for(decaying(9, ("loop.num_steps",)), run)
    assert record.read(run / "config.json")["binding"]["loop.num_steps"] == 9


# --- What resumed runs agree on -------------------------------------------------------------------


def _recorded(config, folder: Path) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(record.new(config)))
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"optim__learning_rate": 1.0},
        {"rewards__weights": (0.5,)},
        {"batch__group": 4},
        {"rollout__temperature": 0.9},
        {"model__width": 64},
        {"data__num_train": 5},
        {"data__overlong": "drop"},
        {"optim__moments_dtype": "int8"},
        {"rollout__kv_cache_dtype": "int8"},
    ],
)
def test_what_changes_the_result_binds(changes, tmp_path):
    file = _recorded(valid(), tmp_path)
    assert record.continued(file, valid()) is None
    (key, value), name = next(iter(changes.items())), next(iter(changes)).replace("__", ".")
    then, now = options.BY_NAME[name].default, value
    if isinstance(then, tuple):
        then, now = list(then), list(now)
    with pytest.raises(ValueError) as info:
        record.continued(file, valid(**{key: value}))
    assert f"{name}: {then!r} there, {now!r} now" in str(info.value)
    assert str(tmp_path) in str(info.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"loop__num_steps": 7},
        {"evaluation__every_steps": 3},
        {"checkpoint__keep": 9},
        {"logging__tensorboard": False},
        {"mesh__data": 1},
        {"compile_cache": False},
        {"profile__steps": (1, 2)},
        {"debug__nans": True},
        {"batch__microbatch": 4},
        {"batch__microbatch": -1, "model__remat": "auto", "batch__memory_limit_gib": 8.0},
        {"guards__reward": "stop"},
        {"sft__checkpoint_every_steps": 4},
    ],
)
def test_what_only_carries_it_out_does_not_bind(changes, tmp_path):
    assert record.continued(_recorded(valid(), tmp_path), valid(**changes)) is None


def test_the_length_of_a_run_binds_where_the_schedule_ends_with_it(tmp_path):
    file = _recorded(valid(optim__schedule="cosine"), tmp_path)
    with pytest.raises(ValueError, match=r"loop.num_steps: 100 there, 7 now"):
        record.continued(file, valid(optim__schedule="cosine", loop__num_steps=7))


def test_many_changes_are_counted(tmp_path):
    other = valid(seed=1, model__width=64, batch__group=4, batch__prompts=8, data__num_train=5,
                  rollout__top_k=3, optim__beta1=0.5)  # fmt: skip
    with pytest.raises(ValueError, match="and 2 more"):
        record.continued(_recorded(valid(), tmp_path), other)


def test_an_option_binds_though_its_name_begins_like_a_free_one():
    """Each is free by its own mark, not by the beginning of its name."""
    config = valid()
    with config.unlocked():
        config.rollout.compact_rows = True
    assert options.BY_NAME["rollout.compact"].free
    assert record.binding(config)["rollout.compact_rows"] is True
