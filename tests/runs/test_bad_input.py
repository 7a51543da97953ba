"""Mistakes of a user: each ends the program within seconds, with status 1 and one clear message.

`python tests/runs/test_bad_input.py` prints the mistakes with their messages as a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # pytest has conftest.py for this
    sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import pytest
from growth import processor_s
from mistakes import TINY, make_model, refusal
from safetensors.numpy import load_file, save_file

from grpo_jax import sft
from grpo_jax import train as train_lib
from grpo_jax.config import arguments as arguments_lib
from grpo_jax.config import loading
from grpo_jax.config import record as record_lib
from grpo_jax.config.dotted import flatten
from grpo_jax.planning import fit
from grpo_jax.trainers import grpo_run

# Of the processor, in this thread: most take less than one second, those that sample first must
# compile.
LIMIT_S = 30

REWARDS = """
def raises(prompts, completions, **columns):
    raise KeyError("gold")

def too_short(prompts, completions, **columns):
    return [1.0] * (len(completions) - 1)

def words(prompts, completions, **columns):
    return ["good"] * len(completions)
"""


def _changed_model(folder: Path, change: Callable[[dict], None]) -> str:
    file = make_model(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"--config.model.path={folder}"


def _file(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _jsonl(path: Path, *lines: str) -> list[str]:
    _file(path, "".join(line + "\n" for line in lines))
    return ["--config.data.task=", f"--config.data.path={path}"]


def _data(path: object, **options: object) -> list[str]:
    """Arguments for problems of a dataset, by its path and other options of `data`."""
    more = [f"--config.data.{name}={value}" for name, value in options.items()]
    return ["--config.data.task=", f"--config.data.path={path}", *more]


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _splits(folder: Path, text: str = '{"prompt": "1+1=", "answer": "2"}\n') -> Path:
    """A folder with two splits, of which train.jsonl holds the text."""
    folder.mkdir()
    (folder / "train.jsonl").write_text(text)
    (folder / "test.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    return folder


def _rows(**columns) -> str:
    return json.dumps(columns)


def _used_workdir(folder: Path) -> list[str]:
    """Arguments for the workdir of a run that did something with another learning rate."""
    config = loading.load(str(TINY), ["--config.optim.learning_rate=0.5"])
    workdir = folder / "used"
    workdir.mkdir()
    record = {"binding": record_lib.binding(config), "options": flatten(config)}
    (workdir / "config.json").write_text(json.dumps(record))
    (workdir / "metrics.jsonl").write_text('{"step": 0, "reward": 0.0}\n')
    return ["--workdir", str(workdir)]


def _blocked_workdir(folder: Path) -> list[str]:
    return ["--workdir", str(Path(_file(folder / "notes.txt", "mine")) / "run")]


def _strict(model: Path, name: str) -> list[str]:
    return [f"--config.model.path={model}", *_reward(name)]


def _reward(name: str) -> list[str]:
    return [f"--config.rewards.names={name}", "--config.rewards.weights=1.0"]


def _tiny_as(folder: Path, name: str, body: str) -> list[str]:
    return ["--config", _file(folder / name, body)]


# --- The mistakes ---------------------------------------------------------------------------------

# What was done wrong; the arguments, from a folder to use and a sound model's folder; and parts of
# the message: the option or file, the value, the remedy.
Case = tuple[str, Callable[[Path, str], list[str]], tuple[str, ...]]

CASES: list[Case] = [
    (
        "misspelt option",
        lambda tmp, model: ["--config.optim.learning_rat=1e-5"],
        ("optim.learning_rat", "Did you mean optim.learning_rate"),
    ),
    (
        "option without --config.",
        lambda tmp, model: ["--learning_rate=1e-5"],
        ("--learning_rate=1e-5", "--config.name=value"),
    ),
    (
        "option of the wrong type",
        lambda tmp, model: ["--config.batch.prompts=many"],
        ("batch.prompts = 'many'", "a whole number"),
    ),
    (
        "groups of one",
        lambda tmp, model: ["--config.batch.group=1"],
        ("batch.group = 1", "at least 2"),
    ),
    (
        "rows do not split into minibatches",
        lambda tmp, model: ["--config.batch.prompts=5"],
        ("batch.prompts * batch.group = 5 * 4 = 20", "batch.minibatches = 2", "a multiple of 2"),
    ),
    (
        "rows do not split into microbatches",
        lambda tmp, model: ["--config.batch.prompts=12", "--config.batch.microbatch=4"],
        ("batch.microbatch = 4", "a multiple of 8"),
    ),
    (
        "rows do not split over the mesh",
        lambda tmp, model: ["--config.mesh.data=8", "--config.mesh.tensor=1"],
        ("batch.prompts = 4", "mesh.data * mesh.fsdp = 8", "multiple of 8"),
    ),
    (
        "mesh of more devices than there are",
        lambda tmp, model: ["--config.mesh.data=3", "--config.mesh.tensor=1"],
        ("mesh.data = 3", "8 devices", "-1"),
    ),
    (
        "mesh axis of size 0",
        lambda tmp, model: ["--config.mesh.fsdp=0"],
        ("mesh.fsdp = 0", "-1"),
    ),
    (
        "negative mesh axes",
        lambda tmp, model: ["--config.mesh.fsdp=-2", "--config.mesh.data=-4"],
        ("mesh.data = -4", "-1"),
    ),
    (
        "two mesh axes of the rest",
        lambda tmp, model: ["--config.mesh.fsdp=-1", "--config.mesh.data=-1"],
        ("mesh.data", "mesh.fsdp", "-1"),
    ),
    (
        "missing model folder",
        lambda tmp, model: [f"--config.model.path={tmp}/nowhere"],
        ("model.path = ", "nowhere", "no such folder"),
    ),
    (
        "model of a name nobody has",
        lambda tmp, model: ["--config.model.path=no-such-owner/no-such-model"],
        ("no-such-owner/no-such-model", "Check the spelling"),
    ),
    (
        "model without one tensor",
        lambda tmp, model: [
            _changed_model(tmp / "m", lambda t: t.pop("model.norm.weight")),
        ],
        ("model.norm.weight", "do not fit config.json"),
    ),
    (
        "model with a tensor of another shape",
        lambda tmp, model: [
            _changed_model(
                tmp / "m",
                lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].copy()}),
            ),
        ],
        ("model.norm.weight", "[31]", "[32]"),
    ),
    (
        "model with a weight that is NaN",
        lambda tmp, model: [
            _changed_model(tmp / "m", lambda t: t["model.norm.weight"].put(3, float("nan"))),
        ],
        ("1 of the 32 values of norm/scale are NaN", "Get its files again"),
    ),
    (
        "unknown reward",
        lambda tmp, model: _reward("exact_anser"),
        ("rewards.names", "exact_anser", "Did you mean exact_answer"),
    ),
    (
        "reward in a module that is not there",
        lambda tmp, model: _reward("no_module_here:f"),
        ("rewards.names", "no_module_here:f", "cannot be imported"),
    ),
    (
        "reward that raises",
        lambda tmp, model: _strict(model, "bad_rewards:raises"),
        (
            "'raises'",
            "KeyError",
            "gold",
            "rewards.max_failed_share = 0.5",
            "bad_rewards.py, line ",
            "The evaluation at the start: no completion has got the reward",
        ),
    ),
    (
        "reward of the wrong length",
        lambda tmp, model: _strict(model, "bad_rewards:too_short"),
        ("'too_short'", "returned 0 values", "one number"),
    ),
    (
        "reward that is no number",
        lambda tmp, model: _strict(model, "bad_rewards:words"),
        ("'words'", "'good'", "Return a finite number"),
    ),
    (
        "weights that do not go with the rewards",
        lambda tmp, model: ["--config.rewards.weights=[1.0]"],
        ("rewards.names has 2", "rewards.weights 1", "one weight for each"),
    ),
    (
        "workdir of another config",
        lambda tmp, model: _used_workdir(tmp),
        ("--workdir", "used", "used holds", "optim.learning_rate: 0.5 there, 0.001 now"),
    ),
    (
        "workdir that cannot be made",
        lambda tmp, model: _blocked_workdir(tmp),
        ("--workdir", "notes.txt/run cannot be written"),
    ),
    (
        "missing config file",
        lambda tmp, model: ["--config", f"{tmp}/gone.py"],
        ("--config", "gone.py", "there is no file"),
    ),
    (
        "config file of another kind",
        lambda tmp, model: _tiny_as(tmp, "run.yaml", "seed: 0\n"),
        ("--config", "run.yaml", ".py"),
    ),
    (
        "config file with a syntax error",
        lambda tmp, model: _tiny_as(tmp, "c.py", "def get_config(:\n"),
        ("--config", "c.py", "line 1"),
    ),
    (
        "config file with a misspelt name",
        lambda tmp, model: _tiny_as(tmp, "c.py", "def get_config():\n    return confg\n"),
        ("--config", "c.py", "confg"),
    ),
    (
        "config file without get_config",
        lambda tmp, model: _tiny_as(tmp, "c.py", "config = 1\n"),
        ("--config", "c.py", "get_config"),
    ),
    (
        "config file whose get_config returns nothing",
        lambda tmp, model: _tiny_as(tmp, "c.py", "def get_config():\n    pass\n"),
        ("--config", "c.py", "get_config"),
    ),
    (
        "unknown task",
        lambda tmp, model: ["--config.data.task=arithmetics"],
        ("data.task = 'arithmetics'", "arithmetic"),
    ),
    (
        "task and file both",
        lambda tmp, model: ["--config.data.path=problems.jsonl"],
        ("data.task = 'arithmetic'", "data.path = 'problems.jsonl'", "exactly one"),
    ),
    (
        "empty problem file",
        lambda tmp, model: [f"--config.model.path={model}", *_jsonl(tmp / "p.jsonl")],
        ("data.path", "p.jsonl", "is empty", "one JSON object"),
    ),
    (
        "missing problem file",
        lambda tmp, model: [
            f"--config.model.path={model}",
            "--config.data.task=",
            f"--config.data.path={tmp}/gone.jsonl",
        ],
        ("data.path", "gone.jsonl", "no such file or folder", "hub id"),
    ),
    (
        "malformed line in a problem file",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_jsonl(tmp / "p.jsonl", _rows(prompt="1+1=", answer="2"), '{"prompt": "1+2='),
        ],
        ("data.path", "p.jsonl, line 2", "not JSON"),
    ),
    (
        "line without a prompt",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_jsonl(tmp / "p.jsonl", _rows(question="1+1=", answer="2")),
        ],
        ("p.jsonl, line 1", "no `prompt`", "question"),
    ),
    (
        "prompt longer than its limit",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_jsonl(tmp / "p.jsonl", _rows(prompt="1+" * 20 + "1=", answer="21")),
        ],
        ("data.max_prompt_tokens = 16", "p.jsonl, line 1", "42 tokens", "at least 42", "overlong"),
    ),
    (
        "only prompts longer than their limit, to be dropped",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_jsonl(tmp / "p.jsonl", _rows(prompt="1+" * 20 + "1=", answer="21")),
            "--config.data.overlong=drop",
        ],
        ("data.max_prompt_tokens = 16", "data.overlong = drop would leave none", "at least 42"),
    ),
    (
        "dataset of a name nobody has",
        lambda tmp, model: [f"--config.model.path={model}", *_data("no-such-owner/no-such-data")],
        ("data.path = 'no-such-owner/no-such-data'", "Check the spelling"),
    ),
    (
        "corrupt Parquet file",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data(_file(tmp / "p.parquet", "PAR1 and no more")),
        ],
        ("data.path", "p.parquet cannot be read as parquet", "corrupted"),
    ),
    (
        "empty folder of problems",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data(_empty(tmp / "none")),
        ],
        ("data.path", "none'", "files such as train.jsonl"),
    ),
    (
        "broken line in a folder",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data(_splits(tmp / "data", '{"prompt": "1+1=", "answer": "2"}\n{"prompt"')),
        ],
        ("data.path", "data/train.jsonl, line 2", "not JSON"),
    ),
    (
        "unknown held-out split",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data(_splits(tmp / "data"), eval_split="valid"),
        ],
        ("data.eval_split = 'valid'", "train, test", "one of them"),
    ),
    (
        "renamed column that is not there",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data(_splits(tmp / "data"), columns="prompt=question"),
        ],
        ("data.columns", "train.jsonl, line 1", "`question`", "prompt, answer"),
    ),
    (
        "template with an unknown column",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data(_splits(tmp / "data"), prompt_template="{question}="),
        ],
        ("data.prompt_template", "{question}", "train.jsonl, line 1", "prompt, answer"),
    ),
    (
        "template with empty braces",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data("p", prompt_template="{prompt}{}"),
        ],
        ("data.prompt_template = '{prompt}{}'", "{{ and }}"),
    ),
    (
        "chat with a tokenizer that has no template",
        lambda tmp, model: [
            f"--config.model.path={model}",
            *_data(_splits(tmp / "data"), chat=True),
        ],
        ("train.jsonl, line 1", "chat template", "data.chat"),
    ),
    (
        "prompt and completion longer than the model",
        lambda tmp, model: [f"--config.model.path={model}", "--config.rollout.max_tokens=2000"],
        ("data.max_prompt_tokens", "rollout.max_tokens", "2010", "1024", "to 1014 or less"),
    ),
    (
        "completion longer than the model that is to be made",
        lambda tmp, model: ["--config.rollout.max_tokens=2000"],
        ("rollout.max_tokens", "2010", "1024", "to 1014 or less"),
    ),
    (
        "solution longer than the model that is to be made",
        lambda tmp, model: ["--config.sft.max_tokens=2000"],
        ("sft.max_tokens", "2010", "1024", "to 1014 or less"),
    ),
    (
        "new model without training",
        lambda tmp, model: ["--config.sft.num_steps=0"],
        ("sft.num_steps = 0", "model.path"),
    ),
    (
        "Weights & Biases without a key",
        lambda tmp, model: [f"--config.model.path={model}", "--config.logging.wandb_project=x"],
        ("logging.wandb_project = 'x'",),
    ),
]


def arguments(case: Case, folder: Path, model: Path) -> list[str]:
    """The program's whole command line; a later argument replaces an earlier one."""
    mesh = ["--config.mesh.data=1", "--config.mesh.tensor=-1"]
    base = ["--config", str(TINY), "--workdir", str(folder / "run"), *mesh]
    return [*base, *case[1](folder, str(model))]


# --- Tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def importable(tmp_path, monkeypatch):
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield
    sys.modules.pop("bad_rewards", None)


def _assert_clear(status: int | None, message: str, parts: tuple[str, ...]) -> None:
    # A wrong command line is 2, as argparse has it.
    is_usage = any(words in message for words in ("Unknown argument", "error: There is no option"))
    assert status == (2 if is_usage else 1), message
    first, *more = message.splitlines()  # and no hint: it is the user's to mend
    assert first.startswith("error: ") and not more
    missing = [part for part in parts if part not in first]
    assert not missing, f"{missing} not in: {first}"


@pytest.mark.parametrize("case", CASES, ids=[name.replace(" ", "-") for name, _, _ in CASES])
def test_a_mistake_gets_one_message(case, tmp_path, model, importable, request):
    # What is wrong with a mesh shows where there are devices to split over.
    request.getfixturevalue("compile_cache" if "mesh" in case[0] else "one_device")
    found = []
    spent_s = processor_s(
        lambda: found.extend(refusal(train_lib.main, arguments(case, tmp_path, model)))
    )
    _assert_clear(*found, case[2])
    assert spent_s < LIMIT_S


def test_a_refused_run_leaves_its_workdir_free(tmp_path, model, importable, one_device):
    """The mended command runs in the same folder, though the options differ."""
    base = [
        "--config", str(TINY), "--workdir", str(tmp_path / "run"),
        f"--config.model.path={model}", "--config.loop.num_steps=1",
        "--config.evaluation.num_problems=0",
    ]  # fmt: skip
    status, message = refusal(train_lib.main, [*base, "--config.data.max_prompt_tokens=4"])
    _assert_clear(status, message, ("data.max_prompt_tokens = 4",))
    # The longest prompt counts, not the limit: one that is larger than the model takes is no fault.
    too_long = ["--config.rollout.max_tokens=1020", "--config.data.max_prompt_tokens=5000"]
    status, message = refusal(train_lib.main, [*base, *too_long])
    _assert_clear(status, message, ("The longest prompt has 10 tokens", "to 1014 or less"))
    status, message = refusal(train_lib.main, [*base, *_strict(model, "bad_rewards:raises")])
    _assert_clear(status, message, ("'raises'",))
    base.append("--config.data.max_prompt_tokens=5000")
    status, message = refusal(train_lib.main, base)
    assert status is None, message
    status, message = refusal(train_lib.main, [*base, *_reward("answer_format")])
    _assert_clear(status, message, ("rewards.names", "different config"))


@pytest.mark.parametrize(
    ("overlong", "words"),
    [
        ("drop", "1 of 5 training problems have prompts of more than data.max_prompt_tokens = 16"),
        ("truncate", "tokens: truncated."),
    ],
)
def test_prompts_over_the_limit_are_counted(overlong, words, tmp_path, model, capsys):
    """The program says what it leaves out; the reading of the data is all that runs here."""
    lines = [_rows(prompt=f"1+{i}=", answer=str(1 + i)) for i in range(4)]
    file = _jsonl(tmp_path / "p.jsonl", *lines, _rows(prompt="1+" * 20 + "1=", answer="21"))
    argv = ["--config", str(TINY), "--workdir", str(tmp_path / "run"), *file]
    argv += ["--config.mesh.data=1", "--config.mesh.tensor=-1", f"--config.model.path={model}"]
    config, folder, *_ = arguments_lib.of_run(
        [*argv, f"--config.data.overlong={overlong}"], "train"
    )
    train = grpo_run.build(config, folder, str(model), fit.of_run).train
    assert words in capsys.readouterr().out
    lengths = [len(ids) for ids in train.prompt_ids]
    assert lengths == [4] * 4 + [16] * (overlong == "truncate")
    assert len(train.problems) == len(train.texts) == len(lengths)


def test_sft_refuses_a_file_without_solutions(tmp_path, model):
    rows = _jsonl(tmp_path / "p.jsonl", _rows(prompt="1+1=", answer="2"))
    argv = arguments(("", lambda tmp, model: [f"--config.model.path={model}", *rows], ()), tmp_path,
                     model)  # fmt: skip
    words = ("data.path", "p.jsonl, line 1", "`completion`", "prompt, answer", "data.columns")
    _assert_clear(*refusal(sft.main, argv), words)
    _assert_clear(
        *refusal(sft.main, [*argv, "--config.sft.num_steps=0"]), ("sft.num_steps = 0", "above 0")
    )


def test_a_traceback_is_given_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no file"):
        refusal(train_lib.main, ["--config", str(tmp_path / "gone.py")])


@pytest.mark.parametrize("module", ["train", "generate"])
def test_a_mistake_in_a_process_of_its_own(module, tmp_path):
    """The same from outside: status, no traceback, nothing on standard output."""
    argv = {
        "train": ["--config", str(TINY), "--workdir", str(tmp_path), "--config.batch.group=1"],
        "generate": ["--model", str(tmp_path / "gone"), "--prompt", "1+1="],
    }[module]
    done = subprocess.run(
        [sys.executable, "-m", f"grpo_jax.{module}", *argv],
        capture_output=True,
        text=True,
        timeout=120,
    )
    parts = {"train": ("batch.group = 1",), "generate": ("gone", "no such folder")}[module]
    _assert_clear(done.returncode, done.stderr, parts)
    assert "Traceback" not in done.stderr + done.stdout


# --- The table ------------------------------------------------------------------------------------


def main() -> None:
    """Prints the mistakes and their messages as a Markdown table."""
    with tempfile.TemporaryDirectory() as root:
        model = make_model(Path(root) / "model")
        (Path(root) / "bad_rewards.py").write_text(REWARDS)
        sys.path.insert(0, root)
        print("| mistake | message | s |\n|---|---|---|")
        for number, case in enumerate(CASES):
            folder = Path(root) / str(number)
            folder.mkdir()
            start = time.monotonic()
            status, stderr = refusal(train_lib.main, arguments(case, folder, model))
            message = stderr.splitlines()[0] if stderr else "nothing"
            message = (
                message.removeprefix("error: ").replace(str(folder), "DIR").replace(root, "DIR")
            )
            message = message.replace("|", "\\|")
            failed = "" if status == 1 else f"**status {status}** "
            print(f"| {case[0]} | {failed}{message} | {time.monotonic() - start:.1f} |", flush=True)


if __name__ == "__main__":
    main()
