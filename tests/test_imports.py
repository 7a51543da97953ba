"""Who may import whom, read from the source; and that importing does nothing."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
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
    *("cli", "__main__", "train", "sft", "dpo", "reward_model", "generate", "evaluate"),
    *("report", "score", "label", "profile", "plan", "export"),
}
# A room, or file of the root, and the rooms it may import besides itself. They stand in blocks
# above its own: what stands side by side in a block does not know of each other.
TABLE = """
    structs
    keys
    messages
    hosts

    devices      structs
    data         messages hosts
    algorithm    structs

    kernels      structs devices
    rewards      messages data
    config       messages data algorithm

    models       structs keys messages hosts devices kernels
    run          structs messages hosts devices

    sampling     structs keys devices kernels models
    learner      structs keys devices algorithm kernels models
    metrics      messages devices run

    environments structs messages hosts devices data rewards models sampling

    setup        structs messages hosts devices data algorithm kernels rewards config models run
                 sampling learner environments

    evaluation   structs messages hosts rewards models run sampling environments
    planning     structs messages hosts devices kernels config models run sampling learner setup

    trainers     structs keys messages hosts devices data algorithm rewards config models run
                 sampling learner metrics environments setup evaluation planning

    programs     structs keys messages hosts devices data rewards config models run sampling metrics
                 environments setup evaluation planning trainers

    api          structs messages hosts devices data rewards config run sampling metrics setup
                 evaluation trainers programs

    trl          rewards api
"""
SEE_THE_CONFIG = {"config", "setup", "planning", "trainers", "programs", "api", "trl"}


def blocks() -> list[dict[str, set[str]]]:
    """The table, block by block: what each room may import."""
    found = []
    for block in TABLE.strip("\n").split("\n\n"):
        rooms: dict[str, set[str]] = {}
        for line in block.splitlines():
            words = line.split()
            if not line.startswith(" " * 5):
                room = words.pop(0)
            rooms.setdefault(room, set()).update(words)
        found.append(rooms)
    return found


MAY_IMPORT = {room: named for block in blocks() for room, named in block.items()}


@functools.cache
def imports(module: str) -> frozenset[str]:
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
    return frozenset(found)


def reached(module: str) -> set[str]:
    """Everything a module imports, through ours also indirectly."""
    seen, todo = set(), [module]
    while todo:
        importer = todo.pop()
        for name in imports(importer):
            if name not in seen:
                seen.add(name)
                # A package's own __init__ runs before its modules, if it has not run already.
                parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
                parents = [p for p in parents if not f"{importer}.".startswith(f"{p}.")]
                todo += [n for n in (name, *parents) if n in FILES]
    return seen


def room(module: str) -> str:
    """The room that a module of ours lies in; "programs" for one at the root that is run."""
    name = module.split(".")[1]
    return "programs" if name in PROGRAMS else name


def in_room(*rooms: str) -> list[str]:
    return [m for m in FILES if m != "grpo_jax" and room(m) in rooms]


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def rooms(names: set[str]) -> set[str]:
    return {room(name) for name in names if name.startswith("grpo_jax.")}


def test_the_parser_sees_imports():
    assert "jax" in roots(imports("grpo_jax.keys"))
    assert "grpo_jax.kernels.attention" in imports("grpo_jax.models.transformer")
    assert "optax" in roots(reached("grpo_jax.trainers.grpo"))
    assert "grpo_jax.devices.transfer" in reached("grpo_jax.learner.optim") | reached(
        "grpo_jax.run.checkpoints"
    )
    assert rooms(imports("grpo_jax.train")) >= {"config", "trainers", "programs"}


def test_the_table_only_points_up():
    above: set[str] = set()
    for block in blocks():
        for name, named in block.items():
            assert named <= above, name
        above |= block.keys()


def test_every_module_lies_in_a_room():
    assert {room(m) for m in FILES if m != "grpo_jax"} == MAY_IMPORT.keys()
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == {"__init__", "structs", "keys"} | PROGRAMS


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_rooms_import_what_the_table_says(name):
    found = {m: rooms(imports(m)) - {name} for m in in_room(name)}
    for module, named in found.items():
        assert named <= MAY_IMPORT[name], module
    assert set().union(*found.values()) == MAY_IMPORT[name], "the table allows what nobody does"


@pytest.mark.parametrize("module", in_room("rewards", "data", "messages"))
def test_rewards_and_data_know_no_jax(module):
    assert not roots(reached(module)) & {"jax", "jaxlib", "flax", "optax", "orbax"}


@pytest.mark.parametrize(
    "module",
    [
        *(f"grpo_jax.environments.{name}" for name in ("forking", "child", "contract", "live")),
        *(m for m in FILES if m.startswith("grpo_jax.environments.tasks.")),
        *(m for m in FILES if m.startswith("grpo_jax.environments.adapters.")),
    ],
)
def test_processes_of_environments_know_no_jax(module):
    """They are forked, which its threads do not survive; nor do they wait for what is large."""
    assert not roots(reached(module)) & {"jax", "jaxlib", "flax", "optax", "orbax", "rich"}


@pytest.mark.parametrize("module", in_room("algorithm"))
def test_the_algorithm_knows_no_model(module):
    assert rooms(reached(module)) <= {"structs", "algorithm"}


@pytest.mark.parametrize("module", in_room(*(MAY_IMPORT.keys() - SEE_THE_CONFIG)))
def test_only_some_rooms_see_a_config(module):
    assert not roots(reached(module)) & {"ml_collections"}
    assert "config" not in rooms(reached(module))


def test_only_programs_read_flags():
    readers = {m for m in FILES if roots(imports(m)) & {"argparse", "absl"}}

    known = PROGRAMS | {"config.arguments", "config.parsers"}
    assert {m.removeprefix("grpo_jax.") for m in readers} <= known
    for module in in_room("programs"):  # what they share alone
        assert imports(module) & set(in_room("programs")) <= {"grpo_jax.cli"}, module


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
from grpo_jax.metrics.tensorboard import EventLog
EventLog(Path({str(tmp_path)!r}), 0, print).close()
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
assert importlib.util.find_spec("torch")  # it is there, and can still be imported
jax.devices()
assert bridge._backends  # the check above sees a backend
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_each_test_file_has_a_name_of_its_own():
    """Else pytest refuses the second in a run of all, and in no smaller one."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [name for name, times in names.items() if times > 1]
