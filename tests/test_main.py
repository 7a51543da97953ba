"""The command grpo-jax: help and lists at once, and the programs under their names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mistakes import TINY

from grpo_jax import __main__ as program
from grpo_jax import __version__, score
from grpo_jax.config import loading, options, reference
from grpo_jax.config.dotted import flatten
from grpo_jax.data import tasks
from grpo_jax.rewards import registry

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HEAVY = "{'jax', 'numpy', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)"


def run(monkeypatch, capsys, *argv) -> tuple[int | None, str, str]:
    """Status and what is said, in this process."""
    monkeypatch.setattr(sys, "argv", ["grpo-jax", *argv])
    try:
        program.main()
        status = None
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_help_names_every_program(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys)
    assert status is None and out == run(monkeypatch, capsys, "--help")[1]
    programs = {p.stem for p in Path(program.__file__).parent.glob("*.py")}
    not_programs = {"__init__", "__main__", "cli", "keys", "structs"}
    assert set(program.PROGRAMS) == programs - not_programs
    assert all(f"\n  {name} " in out for name in [*program.PROGRAMS, *program.LISTS])
    assert run(monkeypatch, capsys, "--version")[1] == f"grpo_jax {__version__}\n"


def test_lists_name_all_there_is(monkeypatch, capsys):
    heads = lambda name: [  # noqa: E731
        line for line in run(monkeypatch, capsys, name)[1].splitlines() if line[0] != " "
    ]
    assert heads("rewards") == list(registry.BUILT_IN)
    assert heads("configs") == sorted(file.stem for file in CONFIGS.glob("*.py"))
    assert all(tasks.load(name) for name in heads("tasks")) and "arithmetic" in heads("tasks")
    assert "Sums of several terms" in run(monkeypatch, capsys, "tasks")[1]
    whole = run(monkeypatch, capsys, "options")[1]
    assert all(f"  {name} = " in whole for name in options.BY_NAME)
    part = run(monkeypatch, capsys, "options", "optim", "mesh")[1]
    assert "\n  optim.beta1 = 0.9" in part and "\n  mesh.tensor" in part and "batch." not in part


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "there is no program 'trian'. Give one of train, sft"),
        (["options", "optimizer"], "'optimizer' is no section of options: model, lora, data"),
        (["tasks", "arithmetic"], "grpo-jax tasks takes no arguments"),
    ],
)
def test_what_there_is_not_is_refused(argv, words, monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, *argv)
    assert status == 2 and not out and words in err


def test_a_config_is_printed_as_a_file_that_gives_it(monkeypatch, capsys, tmp_path):
    more = ["--config.optim.learning_rate=0.25", "--config.rewards.names=('exact_answer',)"]
    more += ["--config.rewards.weights=(2.0,)"]
    status, out, _ = run(
        monkeypatch, capsys, "train", "--config", str(TINY), "--print-config", *more
    )
    assert not status
    (tmp_path / "printed.py").write_text(out)
    found = loading.load(str(tmp_path / "printed.py"), [])
    assert flatten(found) == flatten(loading.load(str(TINY), more))
    assert reference.as_file(options.default()).count("\n    c.") == 0


def test_configs_that_come_with_the_package_have_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for file in CONFIGS.glob("*.py"):
        assert flatten(loading.read(file.stem, [])) == flatten(loading.read(str(file), []))
    Path("quickstart").write_text("a file of one's own")
    with pytest.raises(ValueError, match=r"quickstart is not a Python file"):
        loading.read("quickstart", [])
    with pytest.raises(ValueError, match=r"no file 'quikstart'. .* debug_gpu, distill, dpo"):
        loading.read("quikstart", [])


@pytest.mark.parametrize(
    "argv",
    [["train", "--help"], ["sft", "--print-config", "--config=sft"], ["completion", "bash"]],
)
def test_help_comes_before_what_takes_seconds_to_import(argv):
    code = (
        "import sys; from grpo_jax import __main__ as program\n"
        f"sys.argv = ['grpo-jax', *{argv!r}]\n"
        f"try: program.main()\nfinally: print({HEAVY}); sys.exit()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert argv[1] != "--help" or "usage: grpo-jax train --config FILE" in done.stdout


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["rewards"], ["configs"], ["options"]]
    + [[name, "--help"] for name in ("train", "score", "evaluate", "generate", "plan")],
    ids=" ".join,
)
def test_nothing_is_wider_than_a_terminal(argv, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(monkeypatch, capsys, *argv)
    assert len(out.splitlines()) > 5 and not [line for line in out.splitlines() if len(line) > 80]


def test_the_list_of_rewards_is_no_wider_either(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = score._listing().splitlines()
    assert len(lines) > 100 and not [line for line in lines if len(line) > 80]


def test_a_list_may_be_cut_by_a_pager():
    command = f"{sys.executable} -m grpo_jax options | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("Options") and not done.stderr


def test_a_program_runs_under_its_name():
    """With status and messages of its own."""
    command = [sys.executable, "-m", "grpo_jax", "generate", "--model", "gone", "--prompt", "1"]
    done = subprocess.run([*command, "--max_tokens", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and "--max-tokens 0 must be above 0" in done.stderr
    done = subprocess.run([*command, "--max-token", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean --max-tokens?" in done.stderr
