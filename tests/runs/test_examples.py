"""The examples run as they stand, beside a folder of the name that they give their model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drive import run_code
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo_jax.config import options
from grpo_jax.devices import sharding
from grpo_jax.models import policy
from grpo_jax.models.hf.export import save
from grpo_jax.run.append_log import read_jsonl
from grpo_jax.setup import model as model_lib

FILE = {f.name: f for f in (Path(__file__).resolve().parents[2] / "examples").glob("*.*")}


def code_of(file: Path) -> str:
    """The code of a script, or of a notebook's cells, the last value of each printed."""
    if file.suffix == ".py":
        return file.read_text()
    cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small random model that writes any text, byte by byte."""
    folder = tmp_path_factory.mktemp("examples")
    tokens = ["<pad>", "<eos>", *bytes_to_unicode().values()]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
    )
    config = options.default()
    config.model.update(num_layers=1, width=32, mlp_width=48, num_heads=4, num_kv_heads=2)
    new = model_lib.new(config.model, tokenizer)
    params = policy.load_params(new, sharding.make_mesh(), seed=0)
    save(
        folder / "stories260K", params, new.model, source=None, dtype="float32",
        tokenizer=tokenizer,
    )  # fmt: skip
    return folder


def test_the_readmes_own_task_runs(place, monkeypatch, one_device, capsys):
    """As it stands, but for the model's name and sizes: with a tiny model for chats."""
    tokenizer = Qwen2Tokenizer.from_pretrained(place / "stories260K")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shutil.copytree(place / "stories260K", place / "chats")
    tokenizer.save_pretrained(place / "chats")
    page = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(import grpo_jax\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    for stands, here in (
        ("Qwen/Qwen2.5-0.5B-Instruct", "chats"),
        ('"num_steps": 50, "max_tokens": 128', '"num_steps": 1, "max_tokens": 4, "prompts": 2'),
        ("range(1000)", "range(4)"),
        ("**options)", 'workdir="runs/own", **options)'),
        ('"25 + 7 = ?"}])', '"25 + 7 = ?"}], max_tokens=2)'),
    ):
        assert stands in code
        code = code.replace(stands, here)
    monkeypatch.chdir(place)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert "Picture('runs/own/curves.png')" in capsys.readouterr().out
    (row,) = read_jsonl(place / "runs" / "own" / "metrics.jsonl")
    assert row["reward/correct"] >= 0 and not row.get("rewards/failed/correct")


@pytest.mark.slow
def test_the_script_runs(place, alone):
    """As it is typed in, so that its functions stand in no file."""
    done = subprocess.run(
        [sys.executable, "-"],
        input=code_of(FILE["own_reward.py"]), cwd=place, env=alone, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Picture('runs/short_words/curves.png') -" in done.stdout


SAYS = {
    "watch_and_stop.ipynb": ("Trained('runs/many_words', stopped)", "'runs/many_words', finished"),
    "ask_and_judge.ipynb": (" before, ",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_runs(name, place, one_device, monkeypatch):
    """All of its cells, as of a main module that stands in no file."""
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # and put it back
    said = run_code(code_of(FILE[name]))
    assert all(words in said for words in SAYS[name]), said


def test_a_notebook_is_the_script():
    """Cell by cell: what it does, the run of the script has shown."""
    assert FILE.keys() == {"stories260K.py", "own_reward.py", "own_reward.ipynb", *SAYS}
    script = code_of(FILE["own_reward.py"]).partition('"""\n\n')[2]
    shows = 'print(run.curves(), run.metrics[-1]["reward"])'
    assert shows in script
    lines = script.replace(shows, "run.curves()").split("\n")
    told = [line for line in code_of(FILE["own_reward.ipynb"]).split("\n") if line]
    assert told == [line for line in lines if line]


def test_the_script_is_short_and_is_that_of_the_docs():
    script = FILE["own_reward.py"].read_text()
    body = script.partition('"""\n\n')[2]
    assert len(body.splitlines()) <= 15
    docs = Path(__file__).resolve().parents[2] / "docs" / "python.md"
    assert f"```python\n{body}```" in docs.read_text()


def test_the_notebook_of_ones_own_reward_is_short():
    assert len([line for line in code_of(FILE["own_reward.ipynb"]).splitlines() if line]) <= 15
