"""What a run says, in each of its ways, and the command that hears of events."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from grpo_jax import cli
from grpo_jax.config import options
from grpo_jax.hosts import processes
from grpo_jax.messages import console, events
from grpo_jax.messages.console import print_title, say
from grpo_jax.messages.progress import Progress
from grpo_jax.metrics.summary import summary_table
from grpo_jax.run.stop import STATUS, Stopped
from grpo_jax.trainers import guards


@pytest.fixture
def shown(monkeypatch):
    """What the terminal gets, as text; afterwards all is said again."""
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=file, width=100, highlight=False))
    monkeypatch.setattr("grpo_jax.metrics.summary.console", console.console)
    yield lambda: file.getvalue()
    console.show_as("auto")


def speak():
    """Some of all that a run says."""
    print_title("GRPO: 2 steps")
    say("Seed 0")
    say("warning: a reward failed")
    with Progress(2) as progress:
        for step in (1, 2):
            progress.update(step, {"reward": 0.5, "policy/kl": float("nan")})
    events.happened("evaluation", "accuracy 50 %", step=2, accuracy=0.5)
    say("Evaluation: 50 %", always=True)
    summary_table({"seed": 0, "export": "runs/a/export"})


def test_all_is_said_by_default(shown):
    speak()
    for word in ("GRPO: 2 steps", "Seed 0", "warning: a reward", "step 2/2", "Run finished"):
        assert word in shown()
    assert "{" not in shown()


def test_a_quiet_run_says_warnings_evaluations_and_its_end(shown):
    console.show_as("quiet")
    speak()
    first, second, *box = shown().splitlines()
    assert (first, second) == ("warning: a reward failed", "Evaluation: 50 %")
    assert "Run finished" in box[0] and len(box) == 4


def test_each_line_is_an_object_for_machines(shown, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", 'a"secret\\that is long')
    console.show_as("json")
    speak()
    say('the key is a"secret\\that is long\x1b[31m \u202e')
    events.happened("finished", "", summary={"score": float("inf"), "steps": [1, 2]})
    rows = [json.loads(line) for line in shown().splitlines()]
    assert all(abs(row.pop("time") - time.time()) < 1000 for row in rows)
    assert rows == [
        {"event": "message", "text": "GRPO: 2 steps"},
        {"event": "message", "text": "Seed 0"},
        {"event": "warning", "text": "warning: a reward failed"},
        {"event": "step", "step": 1, "steps": 2, "reward": 0.5, "policy/kl": None},
        {"event": "step", "step": 2, "steps": 2, "reward": 0.5, "policy/kl": None},
        {"event": "evaluation", "text": "accuracy 50 %", "step": 2, "accuracy": 0.5},
        {"event": "message", "text": "Evaluation: 50 %"},
        {"event": "message", "text": "the key is ***\x1b[31m \u202e"},
        {"event": "finished", "text": "", "summary": {"score": None, "steps": [1, 2]}},
    ]
    assert shown().isascii() and "\x1b" not in shown()


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    given = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True), "d": Path("x")}
    assert console.plain(given) == {"a": 0.5, "b": 3, "c": True, "d": "x"}


# --- The command ----------------------------------------------------------------------------------


def noting(folder, then=""):
    """A command that writes down what it was given."""
    script = folder / "note.py"
    script.write_text(
        "import json, os, sys\n"
        f"with open({str(folder / 'noted')!r}, 'a') as file:\n"
        "    given = json.load(sys.stdin), os.environ['GRPO_JAX_EVENT'], sys.argv[1:]\n"
        "    file.write(json.dumps([*given, os.environ['GRPO_JAX_WORKDIR']]) + '\\n')\n" + then
    )
    return f"{sys.executable} {script}"


def noted(folder):
    file = folder / "noted"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_command_is_told_what_happened(tmp_path, monkeypatch, shown):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_API_KEY", "a secret that is long")
    command = noting(tmp_path) + " 'two words' '$(touch hacked); x'"
    with events.told_to(command, Path("runs/a")):
        events.happened("evaluation", "is not told")
        events.happened("finished", "key: a secret that is long; `touch hacked`", accuracy=0.5)
    events.happened("failed", "nobody listens any more")
    ((facts, event, argv, workdir),) = noted(tmp_path)
    assert event == facts.pop("event") == "finished" and facts.pop("time") > 0
    assert workdir == facts.pop("workdir") == str(tmp_path / "runs/a")
    assert argv == ["two words", "$(touch hacked); x"]  # no shell read it
    assert facts == {"text": "key: ***; `touch hacked`", "accuracy": 0.5}
    assert not (tmp_path / "hacked").exists() and not shown()


def is_running(process):
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True
    )
    return state.stdout.strip() and not state.stdout.startswith("Z")


def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch, shown):
    monkeypatch.setattr(events, "_LIMIT_S", 1.0)
    script = f"sleep 600 & echo $! > {tmp_path}/child; wait"
    with events.told_to(f'sh -c "{script}"', tmp_path):
        events.happened("guard", "one")
        events.happened("guard", "two")
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 60
    while is_running(child) and time.monotonic() < until:  # a signal takes its time to arrive
        time.sleep(0.05)
    assert not is_running(child)
    assert shown().count("warning: logging.on_event failed for 'guard'") == 1  # told once
    assert "it took more than 1 s, and was ended" in shown()


def test_one_that_fails_is_told_once(tmp_path, shown):
    with events.told_to("sh -c 'echo first >&2; echo no such channel >&2; exit 3'", tmp_path):
        for _ in range(3):
            events.happened("guard", "x")
    assert shown().splitlines() == [
        "warning: logging.on_event failed for 'guard': status 3: no such channel. The run goes on."
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("say 'hello", "No closing quotation"),
        ("no_such_program --now", "there is no program 'no_such_program'"),
        ("  ", "there is no program ''"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(command, words, tmp_path):
    with pytest.raises(ValueError, match=rf"^logging.on_event = .*{words}"):
        with events.told_to(command, tmp_path):
            raise AssertionError("it began")


# --- How a run ends -------------------------------------------------------------------------------


def config_of(command, way="auto"):
    config = options.default()
    config.logging.on_event, config.logging.console = command, way
    return config


@pytest.mark.parametrize(
    ("error", "event", "text"),
    [
        (Stopped("Stopped by SIGTERM at step 3"), "stopped", "Stopped by SIGTERM at step 3"),
        (ValueError("loop.x = 3\nmust be 4"), "failed", "loop.x = 3 must be 4"),
        (RuntimeError("out of luck"), "failed", "RuntimeError: out of luck"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt:"),
    ],
)
def test_an_end_is_told(error, event, text, tmp_path, shown):
    with pytest.raises(type(error)):
        with cli.told(config_of(noting(tmp_path)), tmp_path):
            raise error
    ((facts, _, _, _),) = noted(tmp_path)
    assert (facts["event"], facts["text"]) == (event, text)


def test_an_end_at_once_is_told_before_it(tmp_path):
    """As where a stop leaves the run, or the watchdog ends it."""
    for status, event in ((STATUS, "stopped"), (1, "failed")):
        code = (
            "from pathlib import Path; from grpo_jax import cli\n"
            "from grpo_jax.config import options; from grpo_jax.hosts import processes\n"
            f"c = options.default(); c.logging.on_event = {noting(tmp_path)!r}\n"
            f"with cli.told(c, Path('x')): processes.abort('it is over', {status})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert noted(tmp_path)[-1][0]["event"] == event
        assert noted(tmp_path)[-1][0]["text"] == "it is over"


def test_only_the_first_process_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with pytest.raises(ValueError), cli.told(config_of(noting(tmp_path)), tmp_path):
        raise ValueError("all of them see it")
    assert not noted(tmp_path)


def test_a_guard_that_speaks_is_told(tmp_path, shown):
    guard = guards.Guards(options.default(), guards.History(), "runs/a", updates_per_step=1)
    with events.told_to(noting(tmp_path), tmp_path):
        for step in range(1, 13):
            guard.check_rollout(step, {"reward": 0.0, "groups/equal_share": 1.0})
    told = [facts for facts, *_ in noted(tmp_path)]
    found = {(f["event"], f["guard"], f["step"], f["action"]) for f in told}
    assert found == {("guard", "equal_groups", step, "warn") for step in (10, 11)}
    assert all("guards.equal_groups" in f["text"] for f in told)
    assert os.path.isabs(told[0]["workdir"])
