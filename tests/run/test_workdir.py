"""A run's folder: whose it is, what was saved of it, and files written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from grpo_jax.config import definitions, options
from grpo_jax.config.dotted import flatten
from grpo_jax.run import workdir
from grpo_jax.run.whole_files import write_json, write_whole
from grpo_jax.setup.run_folder import open_for


def _config(**optim):
    config = options.default()
    config.data.task = "arithmetic"
    config.optim.update(optim)
    return config


def test_a_new_folder_records_its_config(tmp_path):
    folder = open_for(_config(), tmp_path / "a" / "b")
    record = json.loads((folder / "config.json").read_text())
    assert record["options"]["optim.learning_rate"] == 1e-6
    assert record["options"].keys() == flatten(options.default()).keys()
    assert record["definitions"] == definitions.in_force(_config())
    assert "loop.num_steps" in record["options"] and "loop.num_steps" not in record["binding"]


@pytest.mark.parametrize("result", ["metrics", "checkpoint", "bootstrap"])
def test_a_folder_with_results_keeps_to_its_config(tmp_path, result):
    open_for(_config(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    if result == "metrics":
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    else:
        part = tmp_path / "bootstrap" if result == "bootstrap" else tmp_path
        (part / "checkpoints" / "4").mkdir(parents=True)
    open_for(_config(), tmp_path)
    with pytest.raises(ValueError, match=r"optim.learning_rate: 1e-06 there, 0.5 now"):
        open_for(_config(learning_rate=0.5), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_folder_without_results_takes_another_config(tmp_path):
    """A run that was refused while it was set up must not refuse the mended one."""
    open_for(_config(), tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    open_for(_config(learning_rate=0.5), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["binding"]["optim.learning_rate"] == 0.5


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--workdir .*file/run cannot be written"):
        open_for(_config(), tmp_path / "file" / "run")


def test_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is no folder of this machine.* checkpoint\.folder"):
        open_for(_config(), Path("gs://bucket/run"))
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    """A crash while writing leaves the old text."""
    file = tmp_path / "f.json"
    write_whole(file, "old\n")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(file, "new\n")
    assert file.read_text() == "old\n"
    monkeypatch.undo()
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


# --- Runs whose checkpoints are gone --------------------------------------------------------------


@pytest.fixture
def logged(tmp_path):
    """The folder of a run of 6 steps, before any checkpoint."""
    for name in ("metrics", "samples"):
        lines = "".join(f'{{"step": {step}}}\n' for step in range(1, 7))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def test_a_run_that_has_saved_nothing_begins_again(logged, capsys):
    workdir.begin(logged, "DISK", again=False)
    assert "no checkpoint yet: its 6 steps are computed again" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_gone_asks(logged, capsys):
    """Nothing is changed; with the option its logs are kept."""
    workdir.note_saved(logged, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of 6 steps .* DISK holds none.*begin_again=True"):
            workdir.begin(logged, "DISK", again=False)
    before = (logged / "metrics.jsonl").read_text()
    workdir.begin(logged, "DISK", again=True)
    assert (logged / "metrics_1.jsonl").read_text() == before
    assert (logged / "samples_1.jsonl").exists() and not (logged / "samples.jsonl").exists()
    workdir.begin(logged, "DISK", again=False)  # it is a run without checkpoints again


def test_a_run_that_was_rolled_back_to_its_start_has_none(logged):
    workdir.note_saved(logged, 4)
    workdir.note_saved(logged, None)
    workdir.begin(logged, "DISK", again=False)
    assert (logged / "metrics.jsonl").exists() and not (logged / "metrics_1.jsonl").exists()
