"""Runs that a Python program starts: the same ones, of objects in place of names and files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading

import datasets
import jax
import pytest
import shared_programs
from kill_and_resume import log_differences, state_differences
from mistakes import TINY, make_model

import grpo_jax
from grpo_jax import generate, train
from grpo_jax.api import options, training
from grpo_jax.rewards import given

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 9)]
MODULE = """
def right(completions, answer, **columns):
    return [float(a in c) for c, a in zip(completions, answer)]

def short(completions, **columns):
    return [-len(c) / 3 for c in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("python") / "model")


def rewards(share: float = 3.0):
    """Functions of a function, which no process could import."""

    def right(completions, answer, **columns):
        return [float(a in c) for c, a in zip(completions, answer)]

    def short(completions, **columns):
        return [-len(c) / share for c in completions]

    return [right, (short, 0.5)]


def trained(folder, model, **more):
    known = {"data": ROWS, "eval_data": datasets.Dataset.from_list(ROWS[:4]), "rewards": rewards()}
    return grpo_jax.train(str(model), config=TINY, workdir=folder, **known | more)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, cache_folder):
    """One that heard of its steps, and what it heard."""
    heard, first = [], jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: first)
        patch.setenv("XDG_CACHE_HOME", cache_folder)
        shared_programs.share(patch.setattr)
        folder = tmp_path_factory.mktemp("python") / "run"
        return trained(folder, model, callbacks=[heard.append]), heard


def test_objects_give_the_run_of_names_and_files(run, model, tmp_path, monkeypatch, one_device):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for name, rows in (("train", ROWS), ("eval", ROWS[:4])):
        lines = (json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    train.main([
        "--config", str(TINY), "--workdir", str(tmp_path / "run"), "--config.data.task=",
        f"--config.model.path={model}", f"--config.data.path={tmp_path}/train.jsonl",
        f"--config.data.eval_path={tmp_path}/eval.jsonl",
        "--config.rewards.names=('my_rewards:right','my_rewards:short')",
        "--config.rewards.weights=(1.0,0.5)",
    ])  # fmt: skip
    assert not log_differences(run[0].workdir, tmp_path / "run")
    assert not state_differences(run[0].workdir, tmp_path / "run")


def test_what_a_program_sees_of_its_run(run):
    done, heard = run
    assert done.is_finished and done.summary["steps"] == 4
    assert [step.number for step in heard] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in done.metrics] == [0, 1, 2, 3, 4]
    for step, row in zip(heard, done.metrics):
        told = {n: None if not math.isfinite(v) else float(v) for n, v in step.metrics.items()}
        assert told | {"step": step.number} == row
        assert len(step.samples) == (0 if step.number == 0 else 4)
    assert [row["completion"] for row in done.samples if row["step"] == 2] == [
        sample["completion"] for sample in heard[2].samples
    ]
    assert {"reward/right", "reward/short"} <= heard[1].metrics.keys()
    assert list(done.metrics.to_pandas()["step"]) == [0, 1, 2, 3, 4]
    assert done.metrics._repr_html_().startswith("<div>")
    assert done.curves()._repr_png_().startswith(b"\x89PNG")
    assert done.report() == done.workdir / "report.html"
    assert "finished" in repr(done)


def test_a_callback_stops_the_run_and_the_same_call_continues_it(run, model, tmp_path, one_device):
    def stops(step):
        if step.number == 2:
            step.stop()

    first = trained(tmp_path / "run", model, callbacks=[stops])
    assert not first.is_finished and first.summary == {}
    assert [row["step"] for row in first.metrics][-1] == 2
    then = trained(tmp_path / "run", model)
    assert then.is_finished
    assert not state_differences(run[0].workdir, then.workdir)
    assert not log_differences(run[0].workdir, then.workdir)


def test_a_program_keeps_its_own_settings_of_jax(run, one_device):
    loaded = run[0].model()
    want = loaded.generate("1+2=", max_tokens=4)
    jax.config.update("jax_enable_x64", True)
    try:
        assert loaded.generate("1+2=", max_tokens=4) == want
        assert run[0].model().generate("1+2=", max_tokens=4) == want
        assert jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)


def test_a_model_answers_as_the_program_does(run, capsys, one_device):
    loaded = run[0].model()
    several = loaded.generate(
        ["1+2=", "3+4="], max_tokens=8, num_samples=3, temperature=0.7, top_k=5, seed=3
    )
    assert [len(one.texts) for one in several] == [3, 3]
    one = loaded.generate("1+2=", max_tokens=8, num_samples=3, temperature=0.7, top_k=5, seed=3)
    generate.main([
        "--model", str(run[0].workdir), "--prompt", "1+2=", "--max-tokens", "8", "--json",
        "--num-samples", "3", "--temperature", "0.7", "--top-k", "5", "--seed", "3",
    ])  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert [line["text"] for line in lines] == one.texts
    assert [line["token_ids"] for line in lines] == one.token_ids
    assert [line["logprobs"] for line in lines] == one.logprobs
    assert [line["stopped"] for line in lines] == one.stopped
    greedy = loaded.generate(["1+2=", "9-4="], max_tokens=8)
    assert [g.text for g in greedy] == [
        loaded.generate(p, max_tokens=8).text for p in ("1+2=", "9-4=")
    ]
    assert loaded.generate([]) == []
    with pytest.raises(ValueError, match="num_samples 2 at temperature 0"):
        loaded.generate("1+2=", num_samples=2)
    with pytest.raises(ValueError, match=r"prompts\[1\] has .* tokens, and with max_tokens 1020"):
        loaded.generate(["1", "1+2=" * 4], max_tokens=1020)


def test_an_evaluation_is_that_of_the_program(run, tmp_path, one_device):
    done, _ = run
    found = done.evaluate(ROWS)
    assert found["reward"].low <= found["reward"].value <= found["reward"].high
    assert found["reward"].value == pytest.approx(
        found["reward/right"].value + 0.5 * found["reward/short"].value
    )
    held_out = done.evaluate()
    last = [row for row in done.metrics if "eval/reward" in row][-1]
    assert held_out["reward"].value == pytest.approx(last["eval/reward"])


def test_a_run_keeps_what_it_was_given(run, model, one_device):
    """Though a later one gives other objects under the same names."""
    done, _ = run
    want = done.evaluate()["reward"].value
    other = [{"prompt": "9+9+9=", "answer": ""}] * 2  # each right; and no letter counts
    options.make_config(TINY, model, rewards(share=1e9), other, other, {})
    assert done.evaluate()["reward"].value == want


def test_functions_reach_the_processes_of_rewards_however_made(alone, model, tmp_path):
    """As in a notebook, whose functions stand in no file."""
    program = f"""
import functools, json
import grpo_jax
WORDS = ["a", "b"]
def counted(text): return sum(text.count(w) for w in WORDS)
def own(completions, **columns): return [counted(c) for c in completions]
class Judge:
    def __init__(self, best): self.best = best
    def __call__(self, completions, **columns): return [self.best] * len(completions)
def of(completions, unit, **columns): return [len(c) * unit for c in completions]
done = grpo_jax.train(
    {str(model)!r}, data={ROWS!r}, config={str(TINY)!r}, workdir={str(tmp_path / "run")!r},
    rewards=[own, Judge(2.0), (functools.partial(of, unit=0.5), 0.1),
             lambda completions, **columns: [1.0] * len(completions)],
    num_steps=1, evaluation={{"num_problems": 0}},
)
print(json.dumps(done.metrics[-1]))
"""
    done = subprocess.run(
        [sys.executable, "-"], input=program, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["reward/own"] == 0 and metrics["reward/Judge"] == 2
    assert metrics["reward/function"] == 1 and metrics["reward/of"] >= 0.5


def test_importing_starts_nothing():
    code = (
        "import sys, grpo_jax; print(sorted({'jax', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_generations": 8}, "no option num_generations.*batch.group"),
        ({"group": "eight"}, r"batch.group = 'eight' is not a whole number"),
        ({"batch": {"group": 0}}, r"batch.group"),
        ({"num_step": 8}, "no option num_step.*loop.num_steps"),
        ({"data": {"train": ROWS}}, r"data holds 'train' by name.*data=dataset\[\"train\"\]"),
        ({"data": [1, 2]}, "data, row 1 is a int"),
        ({"data": [{"prompt": "1"}, {"text": "2"}]}, "data, row 2 lacks prompt and adds text"),
        ({"data": 5}, "data is a int"),
        ({"data": []}, "^data is empty"),
        ({"rewards": [3]}, "rewards holds 3, a int"),
        ({"rewards": [("exact_answer", 1.0, 2.0)]}, "a tuple of 3"),
        ({"rewards": rewards() + rewards()}, "two rewards called 'right'"),
    ],
)
def test_mistakes(one_device, model, tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        trained(tmp_path / "run", model, **more)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_function_that_cannot_be_sent_is_told(one_device, model, tmp_path):
    held = threading.main_thread()._started  # has a lock
    with pytest.raises(ValueError, match="'waits' cannot be sent to the reward workers"):
        generator = (i for i in range(3))

        def waits(completions, **columns):
            return [next(generator) for _ in completions] if held else []

        trained(tmp_path / "run", model, rewards=waits)
    assert given.find("waits") is None


def test_another_program_cannot_go_on(run, model, monkeypatch, one_device):
    monkeypatch.setattr(given, "_FUNCTIONS", {})
    with pytest.raises(ValueError, match="'python:right' is a function that a Python program gave"):
        trained(run[0].workdir, model, rewards=["python:right", ("python:short", 0.5)])


def test_a_mistake_is_told_in_words_of_python(run, model, one_device):
    with pytest.raises(ValueError) as told:
        trained(run[0].workdir, model, learning_rate=0.5)
    assert str(told.value).startswith(f"workdir {run[0].workdir} holds a run of a different config")
    assert "Give the run its own workdir" in str(told.value) and "--" not in str(told.value)
    assert str(told.value).endswith("add checkpoint.accept_changes=optim.learning_rate.")
    text = "--workdir a, --config, data.eval_path = 'python:eval_data' is empty"
    assert training.in_python(text) == "workdir a, --config, eval_data is empty"


def test_names_of_options():
    assert options.option_of("learning_rate") == "optim.learning_rate"  # and sft.learning_rate
    assert options.option_of("group") == "batch.group"
    assert options.option_of("sft.learning_rate") == "sft.learning_rate"
    assert options.option_of("seed") == "seed"
    with pytest.raises(ValueError, match=r"evaluation\.every_steps or checkpoint\.every"):
        options.option_of("every_steps")
