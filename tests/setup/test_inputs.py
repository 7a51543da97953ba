"""What a run reads has sums: which changes they see, and that a run is held to them."""

from __future__ import annotations

import json
import sys
import types
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.data.problems import Problem
from grpo_jax.hosts import processes
from grpo_jax.rewards.registry import Reward
from grpo_jax.setup import inputs

CHAT = [{"role": "user", "content": "hi"}]
PROBLEMS = [Problem("a", {"answer": "1"}), Problem("b", {"answer": "2"})]
IDS = [[1, 2], [3]]


# --- Problems -------------------------------------------------------------------------------------


def test_problems_are_told_apart_by_tokens_and_columns():
    known = inputs.of_problems(PROBLEMS, IDS)
    assert known == inputs.of_problems(PROBLEMS, [[1, 2], [3]]) and known["number"] == 2
    for ids in ([[1, 2], [4]], [[1], [2, 3]], [[3], [1, 2]]):  # another boundary or order, too
        other = inputs.of_problems(PROBLEMS, ids)
        assert other["prompts"] != known["prompts"] and other["columns"] == known["columns"]
    changed = [PROBLEMS[0], Problem("b", {"answer": "3"})]
    other = inputs.of_problems(changed, IDS)
    assert other["prompts"] == known["prompts"] and other["columns"] != known["columns"]


def test_problems_that_are_not_tokens_are_told_apart_by_all_that_makes_them():
    plain = Problem(CHAT, {"x": datetime(2026, 1, 1)})
    found = [
        inputs.of_problems([p])["prompts"]
        for p in (plain, Problem(CHAT, {}, arguments={"tools": []}), Problem("hi", {}))
    ]
    assert len(set(found)) == 3 and inputs.of_problems([plain]) == inputs.of_problems([plain])


# --- The model ------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A folder of two tensors, as the policy that is read from it."""
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {"a": rng.random((64, 32), np.float32), "b": rng.random(3, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"width": 32, "depth": 2, "transformers_version": "5.0"}')
    return types.SimpleNamespace(source=folder)


def _changed(model, name: str, change) -> str:
    before = inputs.of_model(model)
    file = model.source / "model.safetensors"
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file)
    after = inputs.of_model(model)
    return "same" if after == before else " ".join(k for k in after if after[k] != before[k])


def test_a_model_that_learnt_is_another(model):
    assert _changed(model, "a", lambda x: None) == "same"
    assert _changed(model, "b", lambda x: x.__iadd__(1e-3)) == "weights"
    some = lambda x: x.__iadd__(1e-3 * (np.arange(2048).reshape(64, 32) % 50 == 0))  # noqa: E731
    assert _changed(model, "a", some) == "weights"  # one number of fifty


def test_another_configuration_of_the_same_weights(model):
    before = inputs.of_model(model)
    config = model.source / "config.json"
    config.write_text('{"transformers_version": "4.57", "depth": 2, "width": 32}')
    assert inputs.of_model(model) == before  # who wrote it, and in what order, means nothing
    config.write_text('{"width": 32, "depth": 2, "rope_theta": 1e6}')
    after = inputs.of_model(model)
    assert after["configuration"] != before["configuration"]
    assert after["weights"] == before["weights"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x02" + bytes(7) + b"[]"]
)
def test_a_damaged_file_is_left_to_its_reader(model, content):
    (model.source / "model.safetensors").write_bytes(content)
    assert inputs.of_model(model).keys() == {"configuration", "weights"}


def test_the_hubs_revision_is_known(model):
    folder = model.source.parent / "snapshots" / "0a1b"
    folder.parent.mkdir()
    model.source.rename(folder)
    assert inputs.of_model(types.SimpleNamespace(source=folder))["revision"] == "0a1b"
    (folder / "model.safetensors").unlink()  # what a run has kept of a model that is gone
    for source in (folder, None):
        assert inputs.of_model(types.SimpleNamespace(source=source)) == {}


def test_modules_of_rewards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "kept_rewards.py"
    file.write_text("def f(completions): pass\n")
    specs = ("kept_rewards:f(a=1)", "mentions(words=['json:'])", "no_such_module:f", "sys:exit")
    rewards = [Reward(s, s, 1.0) for s in specs]
    known = inputs.of_rewards(rewards)
    assert known.keys() == {"kept_rewards"} and "kept_rewards" not in sys.modules
    file.write_text("def f(completions): return 1\n")
    assert inputs.of_rewards(rewards) != known


# --- A run and its folder -------------------------------------------------------------------------

READ = {
    "training problems": {"number": 7473, "prompts": "a", "columns": "b"},
    "held-out problems": {"number": 5, "prompts": "c", "columns": "d"},
    "model": {"configuration": "e", "weights": "f", "revision": "g"},
    "reward modules": {"mine": "h", "old": "i"},
}


def _with(thing: str, **changes) -> dict:
    return READ | {thing: READ[thing] | changes}


@pytest.fixture
def folder(tmp_path):
    """Of a run that has read READ."""
    (tmp_path / "config.json").write_text('{"binding": {}, "options": {}}')
    inputs.hold(tmp_path, READ)
    return tmp_path


def _recorded(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_what_is_read_is_recorded_beside_the_rest(folder):
    assert _recorded(folder) == {"binding": {}, "options": {}, "read": READ}
    inputs.hold(folder, READ)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (_with("training problems", number=9, prompts="x"), "7,473 training problems there, 9 now"),
        (_with("training problems", prompts="x"), "prompts of the training problems."),
        (_with("held-out problems", prompts="x", columns="y"),
         "prompts and columns of the held-out problems."),
        (_with("model", weights="x"), "weights of the model."),
        (_with("model", weights="x", revision="y"), "weights of the model (hub revisions g, y)."),
        (_with("model", configuration="x") | {"training problems": {"number": 1}},
         "7,473 training problems there, 1 now; configuration of the model."),
    ],
)  # fmt: skip
def test_something_else_is_refused_by_name(folder, now, words):
    with pytest.raises(ValueError) as error:
        inputs.hold(folder, now)
    assert f"--workdir {folder} holds a run that read something else: {words}" in str(error.value)
    assert _recorded(folder)["read"] == READ


@pytest.mark.parametrize(
    ("thing", "accept", "other"),
    [
        ("training problems", "data.path", "model.path"),
        ("training problems", "data.split", "model.dtype"),  # any option of data decides on them
        ("held-out problems", "data.eval_path", "seed"),
        ("model", "model.path", "model.dtype"),
    ],
)
def test_a_change_that_is_accepted_is_noted(folder, thing, accept, other):
    """And is the run's from then on."""
    now = _with(thing, **{part: 9 if part == "number" else "x" for part in READ[thing]})
    named = {"training problems": "data.path", "held-out problems": "data.eval_path"}
    option = named.get(thing, "model.path")
    with pytest.raises(ValueError, match=rf"changes={option}\.$"):
        inputs.hold(folder, now, (other,))
    inputs.hold(folder, now, (accept,))
    record = _recorded(folder)
    assert record["read"] == now
    noted = [(change["option"], change["from"], change["to"]) for change in record["changes"]]
    assert noted == [(option, READ[thing], now[thing])]
    inputs.hold(folder, now)
    assert _recorded(folder) == record
    with pytest.raises(ValueError, match="read something else"):
        inputs.hold(folder, READ)


def test_several_changes_are_accepted_together(folder):
    now = _with("model", weights="x") | {"training problems": {"number": 1}}
    with pytest.raises(ValueError, match=r"""changes="\('data.path','model.path'\)"\.$"""):
        inputs.hold(folder, now)
    inputs.hold(folder, now, ("data.path", "model.path"))


@pytest.mark.parametrize(
    "now",
    [
        _with("model", revision="another, of the same weights"),
        {k: v for k, v in READ.items() if k != "held-out problems"},
        READ | {"more": {"number": 1}, "model": {}},
        _with("reward modules", new="j"),
    ],
)
def test_what_cannot_be_compared_is_taken_and_recorded(folder, now, capsys):
    inputs.hold(folder, now)
    known = {thing: READ.get(thing, {}) | now.get(thing, {}) for thing in READ | now}
    assert _recorded(folder)["read"] == known and "edited" not in capsys.readouterr().out


def test_edited_rewards_are_told_once(folder, capsys):
    for _ in range(2):
        inputs.hold(folder, _with("reward modules", mine="x"))
    assert capsys.readouterr().out.count("'mine' in rewards.names was edited") == 1


def test_processes_that_read_different_things_are_refused(folder, monkeypatch):
    other = _with("training problems", number=9)
    monkeypatch.setattr(processes, "gather", lambda value, what: [value, other])
    monkeypatch.setattr(processes, "name", "process {}".format)
    with pytest.raises(ValueError, match=r"process 1 reads .* 7,473 training .* Give all the same"):
        inputs.hold(folder, READ)


# --- The date -------------------------------------------------------------------------------------


def test_the_date_is_that_of_the_start(folder):
    first = inputs.date("", folder)
    assert timedelta() <= datetime.now() - first < timedelta(minutes=5)
    record = _recorded(folder)
    assert record["read"] == READ and datetime.fromisoformat(record["date"]) == first
    (folder / "config.json").write_text(json.dumps(record | {"date": "2020-02-03T04:05:06"}))
    assert inputs.date("", folder) == datetime(2020, 2, 3, 4, 5, 6)
    assert inputs.date("2021-01-01", folder) == datetime(2021, 1, 1)
    assert inputs.date("").year >= 2026  # of no run
