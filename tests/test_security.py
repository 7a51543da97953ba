"""What the source does not do: no pickles, no code out of data, no shell; read from its syntax."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    p for folder in ("grpo_jax", "configs", "benchmarks") for p in (ROOT / folder).rglob("*.py")
)

MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("yaml", "code", "codeop", "runpy", "pty", "zipimport", "imp"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "sympy.sympify", "sympify"),
    *("sympy.parse_expr", "parse_expr", "pd.read_pickle", "pandas.read_pickle", "exec_module"),
    *("import_module", "Connection", "Pipe"),
}

# What is there all the same, how often, and why.
REASONS = {
    ("grpo_jax/config/loading.py", "exec_module"): (
        1,
        "the user's own config file, which is Python",
    ),
    ("configs/sft.py", "exec_module"): (1, "a config file that changes another"),
    ("grpo_jax/data/tasks/__init__.py", "import_module"): (1, "a name among those of its folder"),
    ("grpo_jax/rewards/registry.py", "import_module"): (1, "the user's own reward functions"),
    ("grpo_jax/rewards/sandbox/server.py", "import_module"): (
        1,
        "modules that the config has programs begin with, in a process without rights",
    ),
    ("grpo_jax/rewards/sandbox/program.py", "exec"): (1, "a program, in its sandbox"),
    ("grpo_jax/rewards/sandbox/program.py", "compile"): (1, "a program, in its sandbox"),
    ("grpo_jax/rewards/sandbox/testing.py", "exec"): (3, "tests of a data set, in a sandbox"),
    ("grpo_jax/rewards/sandbox/testing.py", "compile"): (3, "tests of a data set, in a sandbox"),
    ("grpo_jax/rewards/kinds.py", "import_module"): (1, "fixed names, imported when used"),
    ("grpo_jax/__init__.py", "import_module"): (4, "fixed names, imported when they are used"),
    ("grpo_jax/__main__.py", "import_module"): (2, "the program that is named, of a fixed list"),
    ("grpo_jax/trl/__init__.py", "import_module"): (1, "fixed names, imported when used"),
    ("grpo_jax/environments/described.py", "import_module"): (
        1,
        "the user's own environments, in a process of theirs",
    ),
    **{
        (f"grpo_jax/environments/{name}.py", "pickle"): (
            1,
            "from the trainer to a process that it started, which answers in JSON",
        )
        for name in ("child", "contract", "forking", "home", "live")
    },
    ("benchmarks/beside_trl.py", "import_module"): (1, "one of two fixed names"),
    ("grpo_jax/train.py", "import_module"): (1, "a fixed name, imported when it is used"),
    ("grpo_jax/cli.py", "import_module"): (1, "a program's own fixed name, imported when called"),
    ("grpo_jax/rewards/given.py", "dill"): (
        2,
        "the program's own functions, for processes that it started, through the pipe below",
    ),
    ("grpo_jax/rewards/process.py", "Pipe"): (
        1,
        "pickles between the trainer and a process that it started; no file and no network",
    ),
    ("grpo_jax/evaluation/text_metrics.py", "__import__"): (
        1,
        "whether two packages of fixed names are there",
    ),
    ("grpo_jax/rewards/worker.py", "Connection"): (1, "the other end of that pipe"),
}


def found(tree: ast.AST) -> Counter[str]:
    """The dangerous things of a source, by name, with how often they stand there."""
    names: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module] * ((node.module or "").split(".")[0] in MODULES))
            names.update(a.name for a in node.names if a.name in MODULES | CALLS - {"Connection"})
        elif isinstance(node, ast.Call):
            names.update(_of_call(node))
    return names


def _of_call(node: ast.Call) -> list[str]:
    called = ast.unparse(node.func)
    said = [name for name in (called, called.rpartition(".")[2]) if name in CALLS]
    # A method of an object is none of the built-in functions: re.compile, model.eval.
    own = {"eval", "exec", "compile", "__import__"}
    said = [name for name in said if name == called or name not in own][:1]
    words = {word.arg: ast.unparse(word.value) for word in node.keywords}
    for name, fine in {
        "shell": "False",
        "trust_remote_code": "False",
        "allow_pickle": "False",
    }.items():
        if words.get(name, fine) != fine:
            said.append(f"{name}={words[name]}")
    if called in ("np.load", "numpy.load") and "allow_pickle" not in words:
        said.append("np.load without allow_pickle=False")
    if called.rpartition(".")[2] == "from_pretrained" and None in words:
        said.append("from_pretrained(**)")
    return said


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("import os.path, dill.settings", ["dill.settings"]),
        ("from torch import load\nimport torch\ntorch.load('x')", ["torch.load"]),
        ("eval('1'); model.eval(); re.compile('x'); compile('x', '', 'exec')", ["eval", "compile"]),
        ("subprocess.run('ls', shell=True); subprocess.run(['ls'], shell=False)", ["shell=True"]),
        ("Auto.from_pretrained(x, trust_remote_code=flag)", ["trust_remote_code=flag"]),
        ("np.load(f); np.load(f, allow_pickle=False)", ["np.load without allow_pickle=False"]),
        ("np.load(f, allow_pickle=True)", ["allow_pickle=True"]),
        ("sympy.parse_expr(text)", ["sympy.parse_expr"]),
        ("from sympy import parse_expr", ["parse_expr"]),
        ("importlib.import_module(name)", ["import_module"]),
        ("ast.literal_eval(text); json.loads(text)", []),
    ],
)
def test_what_is_looked_for_is_seen(source, names):
    assert sorted(found(ast.parse(source)).elements()) == sorted(names)


def test_nothing_dangerous_without_a_reason():
    seen = {}
    for file in FILES:
        for name, count in found(ast.parse(file.read_text())).items():
            seen[(str(file.relative_to(ROOT)), name)] = count
    assert len(FILES) > 60
    assert seen == {place: count for place, (count, _) in REASONS.items()}


def test_files_beside_a_model_are_not_imported(tmp_path):
    """Each library by name, and each module of Python that no part of it imports by then."""
    early = {"argparse", "pickle", "random", "string", "token", "queue"}
    for name in importlib.metadata.packages_distributions().keys() | early:
        if name.isidentifier() and name != "grpo_jax":
            (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = subprocess.run(
        [sys.executable, "-m", "grpo_jax.generate", "--model", ".", "--prompt", "hi"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "--model '.' has no config.json" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_every_promise_names_tests_that_exist():
    """SECURITY.md names tests with or without their file, and files of which all tests count."""
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 9
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    defined = {
        node.name: name
        for name, path in files.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        named = re.findall(r"`([^`]*test_[^`]*)`", row.split(" | ")[-1])
        assert named, row
        for name in named:
            file, _, function = name.rpartition("/")[2].partition("::")
            if not file.endswith(".py"):
                file, function = "", file
            assert not file or file in files, name
            known = [d for d, f in defined.items() if not file or f == file]
            assert not function or fnmatch.filter(known, function), name
