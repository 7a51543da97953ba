"""Trackers: what each library is given, and that none of them can hold or end a run.

The libraries are replaced by what notes its calls.
"""

from __future__ import annotations

import math
import sys
import threading
import types

import pytest

from grpo_jax.config import options
from grpo_jax.metrics import trackers
from grpo_jax.metrics.trackers import Asked
from grpo_jax.metrics.writers import Writers
from grpo_jax.trainers import tracking

SAMPLE = {
    "prompt": "1+1?",
    "completion": "#### 2",
    "rewards": {"exact_answer": 1.0, "answer_format": None},
    "extras": {"judge": 7},
    "advantage": -0.5,
    "length": 12,
}
COLUMNS = {
    "prompt": ["1+1?"],
    "completion": ["#### 2"],
    "reward/exact_answer": [1.0],
    "reward/answer_format": [None],
    "advantage": [-0.5],
    "length": [12],
    "extras/judge": ["7"],
}
PACKAGES = {"wandb_project": "wandb", "mlflow_experiment": "mlflow", "trackio_project": "trackio"}


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(trackers, "say", lines.append)
    return lines


def write(folder, asked, steps=(0,)):
    """A run of some steps, each with its samples before its numbers."""
    written = Writers(
        folder, first_step=steps[0], tensorboard=False, trackers=asked, config={"seed": 0, "x": ""}
    )
    for step in steps:
        written.samples(step, [SAMPLE])
        written.scalars(step, {"reward": 0.5, "eval/pass@8": step, "policy/kl": math.nan})
    written.close()


# --- Weights & Biases -----------------------------------------------------------------------------


def fake_wandb(calls, mode="offline", login=lambda **_: True):
    def init(**given):
        calls.append(("init", given))
        return types.SimpleNamespace(
            log=lambda values, step: calls.append((step, values)),
            finish=lambda: calls.append("finish"),
        )

    settings = types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    return types.SimpleNamespace(
        init=init, login=login, setup=lambda: settings, Table=lambda columns, data: (columns, data)
    )


def test_wandb_gets_numbers_and_a_table_and_a_resumed_run_goes_on(tmp_path, monkeypatch, said):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    asked = Asked("p", wandb_entity="team", run_name="mine", tags=("a", "b"))
    write(tmp_path, asked)
    write(tmp_path, asked, steps=(1,))
    (_, first), table, numbers, end, (_, second), *_ = calls
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 12
    assert (first["project"], first["entity"], first["name"]) == ("p", "team", "mine")
    assert first["tags"] == ["a", "b"] and first["config"] == {"seed": 0, "x": ""}
    assert table == (0, {"samples": (list(COLUMNS), [[v[0] for v in COLUMNS.values()]])})
    step, values = numbers
    assert step == 0 and values["reward"] == 0.5 and math.isnan(values["policy/kl"])
    assert end == "finish" and calls[-1] == "finish" and not said


def test_a_run_without_a_name_is_called_as_its_folder(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    write(tmp_path / "lr_3", Asked("p"))
    assert calls[0][1]["name"] == "lr_3" and calls[0][1]["entity"] is calls[0][1]["tags"] is None


def test_wandb_itself_is_asked_for_its_login(monkeypatch):
    asked_for = []

    def login(**given):
        asked_for.append(given)
        return known

    monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], "online", login))
    known = True
    trackers.check(Asked("p"))
    assert asked_for == [{"prompt": False, "verify": False}]  # nobody is there to answer
    known = False
    with pytest.raises(ValueError, match=r"wandb_project = 'p' needs a login: run `wandb login`"):
        trackers.check(Asked("p"))
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], "offline", login))
    trackers.check(Asked("p"))

    def refuses(**_):
        raise RuntimeError("API key must be 40 characters long")

    monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], "online", refuses))
    with pytest.raises(ValueError, match="40 characters"):
        trackers.check(Asked("p"))


# --- MLflow and Trackio ---------------------------------------------------------------------------


class FakeMlflow:
    def __init__(self):
        self.calls = []

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        self.calls.append(("experiment", name))
        return "7"

    def create_run(self, experiment, run_name):
        self.calls.append(("run", experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def set_terminated(self, run, status):
        self.calls.append((run, status))

    def log_batch(self, run, **what):
        assert len(what.get("params", ())) <= 100
        self.calls.append((run, what))

    def log_table(self, run, data, file):
        self.calls.append((run, data, file))


def test_mlflow_gets_names_that_it_takes(tmp_path, monkeypatch, said):
    fake = FakeMlflow()
    entities = types.SimpleNamespace(
        Metric=lambda *given: given, Param=lambda *given: given, RunTag=lambda *given: given
    )
    module = types.SimpleNamespace(MlflowClient=lambda: fake, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    asked = Asked(mlflow_experiment="e", tags=("a@b",))
    write(tmp_path, asked)
    assert not said
    assert fake.calls[:3] == [("experiment", "e"), ("run", "7", tmp_path.name), ("r1", "RUNNING")]
    assert ("r1", {"params": [("seed", "0")]}) in fake.calls  # what is empty is none
    assert ("r1", {"tags": [("a_b", "")]}) in fake.calls
    table, numbers, end = fake.calls[-3:]
    assert table == ("r1", COLUMNS, "samples/step_000000.json")
    assert [(name, step) for name, _, _, step in numbers[1]["metrics"]] == [
        ("reward", 0), ("eval/pass_8", 0), ("policy/kl", 0),
    ]  # fmt: skip
    assert end == ("r1", "FINISHED")
    fake.calls.clear()
    write(tmp_path, asked, steps=(1,))
    assert fake.calls[0] == ("r1", "RUNNING")  # the same run


def test_what_trackio_prints_is_not_among_the_lines_of_the_run(tmp_path, monkeypatch, capsys):
    module = types.ModuleType("trackio")
    code = "Table = None\ndef init(**_):\n    print('* Created new run')\n    raise SystemExit"
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr(trackers, "say", lambda line: None)
    write(tmp_path, Asked(trackio_project="t"))
    assert capsys.readouterr() == ("", "* Created new run\n")


def test_trackio_gets_the_same(tmp_path, monkeypatch, said):
    calls = []

    def init(**given):
        calls.append(given)
        return types.SimpleNamespace(
            log=lambda values, step: calls.append((step, values)),
            finish=lambda: calls.append("finish"),
        )

    fake = types.SimpleNamespace(
        init=init, Table=lambda dataframe: dataframe.to_dict(orient="list")
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    asked = Asked(trackio_project="t", run_name="mine", tags=("a", "b"))
    write(tmp_path, asked)
    write(tmp_path, asked, steps=(1,))
    assert not said
    first, table, numbers, end, second, *_ = calls
    assert first == second and first["resume"] == "allow" and first["name"].startswith("mine-")
    assert first["config"]["tags"] == "a, b" and first["project"] == "t"
    assert table[1]["samples"]["completion"] == ["#### 2"] and numbers[1]["reward"] == 0.5
    assert end == "finish"


# --- What is not there, and what fails ------------------------------------------------------------


@pytest.mark.parametrize("option", PACKAGES)
def test_an_absent_package_is_told(option, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[option], None)
    words = rf"logging\.{option} = 'p' needs .*pip install {PACKAGES[option]}, or"
    with pytest.raises(ValueError, match=words):
        trackers.check(Asked(**{option: "p"}))


def test_nothing_is_imported_that_is_not_asked_for(tmp_path, monkeypatch, said):
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    trackers.check(Asked())
    write(tmp_path, Asked())
    assert not said


@pytest.mark.parametrize("when", ["start", "log", "close"])
def test_one_that_fails_is_told_once_and_ends_nothing(when, tmp_path, monkeypatch, said):
    calls = []

    def fails(*_, **__):
        raise ConnectionError("no route to host") if when != "close" else SystemExit(1)

    class Broken:
        log = fails if when == "log" else lambda *given: calls.append(given)
        close = fails if when == "close" else lambda *given: None
        samples = lambda *given: None  # noqa: E731

    make = fails if when == "start" else lambda *given: Broken()
    monkeypatch.setitem(trackers._KINDS, "wandb_project", ("wandb", "W&B", make))
    write(tmp_path, Asked("p"), steps=(0, 1, 2))
    assert len(said) == 1 and "W&B failed (" in said[0] and "The run goes on" in said[0]
    assert said[0].startswith("warning: ")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(calls) == (3 if when == "close" else 0)


def test_one_that_hangs_holds_nothing(tmp_path, monkeypatch, said):
    over, nothing = threading.Event(), lambda *given: None

    def make(*given):
        over.wait()
        return types.SimpleNamespace(log=nothing, samples=nothing, close=nothing)

    monkeypatch.setitem(trackers._KINDS, "wandb_project", ("wandb", "W&B", make))
    monkeypatch.setattr(trackers, "_CLOSE_S", 0.05)
    write(tmp_path, Asked("p"), steps=(0, 1))
    assert len(said) == 1 and "has not taken everything" in said[0]
    over.set()


# --- From the config ------------------------------------------------------------------------------


def test_what_a_config_asks(monkeypatch):
    config = options.default()
    assert tracking.asked(config) == Asked()
    config.logging.update(
        wandb_project="p", wandb_entity="e", mlflow_experiment="m", trackio_project="t",
        run_name="n", tags=("a", "b", 3),
    )  # fmt: skip
    assert tracking.asked(config) == Asked("p", "e", "m", "t", "n", ("a", "b", "3"))
    assert tracking.asked(config, is_tracked=False) == Asked()
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="is not installed"):
        tracking.check(config)
