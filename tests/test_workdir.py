"""A run's folder: whose it is, files written whole, and the signal to stop."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from grpo_jax import config as config_lib
from grpo_jax import definitions, options, workdir


def _config(**optim):
    config = config_lib.default()
    config.data.task = "arithmetic"
    config.optim.update(optim)
    return config


def test_a_new_folder_records_its_config(tmp_path):
    folder = workdir.open_for(_config(), tmp_path / "a" / "b")
    record = json.loads((folder / "config.json").read_text())
    assert record["options"]["optim.learning_rate"] == 1e-6
    assert record["options"].keys() == options.flatten(config_lib.default()).keys()
    assert record["definitions"] == definitions.in_force(_config())
    assert "loop.num_steps" in record["options"] and "loop.num_steps" not in record["binding"]


@pytest.mark.parametrize("result", ["metrics", "checkpoint", "bootstrap"])
def test_a_folder_with_results_keeps_to_its_config(tmp_path, result):
    workdir.open_for(_config(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    if result == "metrics":
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    else:
        part = tmp_path / "bootstrap" if result == "bootstrap" else tmp_path
        (part / "checkpoints" / "4").mkdir(parents=True)
    workdir.open_for(_config(), tmp_path)
    with pytest.raises(ValueError, match=r"optim.learning_rate: 1e-06 there, 0.5 now"):
        workdir.open_for(_config(learning_rate=0.5), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_folder_without_results_takes_another_config(tmp_path):
    """A run that was refused while it was set up must not refuse the mended one."""
    workdir.open_for(_config(), tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    workdir.open_for(_config(learning_rate=0.5), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["binding"]["optim.learning_rate"] == 0.5


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--workdir .*file/run cannot be written"):
        workdir.open_for(_config(), tmp_path / "file" / "run")


def test_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is no folder of this machine.* checkpoint\.folder"):
        workdir.open_for(_config(), Path("gs://bucket/run"))
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    """A crash while writing leaves the old text."""
    file = tmp_path / "f.json"
    workdir.write_whole(file, "old\n")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        workdir.write_whole(file, "new\n")
    assert file.read_text() == "old\n"
    monkeypatch.undo()
    workdir.write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted(number):
    before = signal.getsignal(number)
    with workdir.StopSignal() as stop:
        assert not stop.asked()
        signal.raise_signal(number)
        assert stop.asked() and stop.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_the_end_of_its_time_is_noted(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(workdir, "_STARTED", now)
    with workdir.StopSignal(0) as never, workdir.StopSignal(1e4) as later:
        assert not never.asked() and not later.asked()
    with workdir.StopSignal(100) as stop:
        assert not stop.asked()
        monkeypatch.setattr(workdir, "_STARTED", now - 101)
        assert stop.asked() and stop.name == "checkpoint.save_before_s = 100"


def test_a_second_interrupt_ends_at_once():
    with workdir.StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.asked() and stop.name == "SIGTERM"
