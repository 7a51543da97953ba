"""Who may import whom, read from the source; and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "grpo_jax"
FILES = {
    ".".join(("grpo_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
PROGRAMS = {
    *("program", "train", "sft", "generate", "evaluate", "report", "score", "profile", "plan")
}
PARTS = ("models", "sampling", "algorithm", "rewards", "data")


def imports(module: str) -> set[str]:
    """Names that a module imports anywhere in it; our modules by their full name."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name for name in names if name in FILES}
            found |= inside if inside else {node.module}
    return found


def reached(module: str) -> set[str]:
    """Everything a module imports, through ours also indirectly."""
    seen, todo = set(), [module]
    while todo:
        for name in imports(todo.pop()):
            if name not in seen:
                seen.add(name)
                # A package's own __init__ runs before its modules.
                parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
                todo += [n for n in (name, *parents) if n in FILES]
    return seen


def in_part(*parts: str) -> list[str]:
    prefixes = tuple(f"grpo_jax.{part}" for part in parts)
    return [m for m in FILES if m.startswith(tuple(f"{p}." for p in prefixes)) or m in prefixes]


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("grpo_jax.")}


def test_the_parser_sees_imports():
    assert "jax" in roots(imports("grpo_jax.keys"))
    assert "grpo_jax.models.attention" in imports("grpo_jax.models.transformer")
    assert "optax" in roots(reached("grpo_jax.grpo"))
    assert {"grpo_jax.models.hf.export", "grpo_jax.sharding"} <= reached("grpo_jax.policy")


@pytest.mark.parametrize("module", in_part("rewards", "data"))
def test_rewards_and_data_know_no_jax(module):
    assert not roots(reached(module)) & {"jax", "jaxlib", "flax", "optax", "orbax"}


@pytest.mark.parametrize("module", in_part("algorithm.losses", "algorithm.advantages"))
def test_losses_know_no_model(module):
    assert ours(reached(module)) <= {"structs"}


@pytest.mark.parametrize("part", PARTS)
def test_parts_do_not_import_their_siblings(part):
    allowed = {  # besides themselves
        "models": {"sharding"},
        "sampling": {"sharding", "compiling", "models"},
        "algorithm": {"sharding", "compiling", "models"},
        "rewards": {"credentials"},
        "data": set(),
    }[part]
    for module in in_part(part):
        assert ours(imports(module)) <= allowed | {part, "structs", "messages", "paths"}, module


@pytest.mark.parametrize("module", in_part(*PARTS, "structs", "keys", "sharding", "optim"))
def test_only_programs_open_the_config_or_read_flags(module):
    assert not roots(reached(module)) & {"argparse", "absl", "ml_collections"}
    assert "config" not in ours(reached(module))


def test_only_programs_read_flags():
    readers = {m for m in FILES if roots(imports(m)) & {"argparse", "absl"}}

    assert {m.removeprefix("grpo_jax.") for m in readers} <= PROGRAMS
    for module in FILES:
        if module.removeprefix("grpo_jax.") not in PROGRAMS | {"results"}:
            assert not ours(imports(module)) & PROGRAMS, module
    assert ours(imports("grpo_jax.results")) & PROGRAMS <= {"report"}  # its pictures


def test_no_two_modules_import_each_other():
    for module in FILES:
        assert module not in reached(module), module


def test_no_file_is_a_drawer():
    assert not {p.name for p in FILES.values()} & {"utils.py", "util.py", "helpers.py", "common.py"}


def test_importing_touches_no_device(tmp_path):
    """Every module imported, no backend started: a program chooses its devices afterwards.

    Nor does any wait for what takes seconds to import and only some runs need.
    """
    code = f"""
import importlib.util, sys, jax
from pathlib import Path
for module in {sorted(FILES)}:
    importlib.import_module(module)
import jax._src.xla_bridge as bridge
assert not bridge._backends, bridge._backends
assert not {{"torch", "scipy.stats", "datasets", "tensorboardX"}} & set(sys.modules)
from grpo_jax.logs import EventLog
EventLog(Path({str(tmp_path)!r}), 0, print).close()
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
assert importlib.util.find_spec("torch")  # it is there, and can still be imported
jax.devices()
assert bridge._backends  # the check above sees a backend
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
