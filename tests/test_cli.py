"""What the programs do before they touch a device."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from mistakes import refusal

import grpo_jax
from grpo_jax import cli
from grpo_jax.config import loading, options
from grpo_jax.config.arguments import load_config
from grpo_jax.run import stop

SCRIPT = """
import os, jax
from grpo_jax.config import options as config; from grpo_jax import cli as program
os.sched_getaffinity = lambda _: set(range(4))
for prompts, microbatch, data, params in [
    (32, 0, -1, 10**6),  # a device for each of four cores
    (6, 0, -1, 10**6),  # three, since four do not divide six groups
    (32, 2, -1, 10**6),  # two share a microbatch of two groups
    (32, 0, 1, 10**6),  # the config wants one
    (32, 0, -1, 10**9),  # too large a model to hold four times
]:
    jax.config.update("jax_num_cpu_devices", -1)
    c = config.default()
    c.batch.prompts, c.batch.microbatch, c.mesh.data = prompts, microbatch, data
    program.use_all_cores(c, params)
    print(jax.config.jax_num_cpu_devices)
jax.config.update("jax_num_cpu_devices", -1)
program.use_all_cores(config.default(), 10**6)
print(jax.device_count(), jax.config.jax_num_cpu_devices)
"""


def _run(flags: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\n")[:-1]


def test_small_models_have_a_device_for_each_core():
    assert _run("") == ["4", "3", "2", "-1", "-1", "4 4"]


def test_flags_that_say_how_many_devices_there_are_hold():
    assert _run("--xla_force_host_platform_device_count=3") == ["-1"] * 5 + ["3 -1"]


@pytest.mark.parametrize(
    ("variables", "folder", "seconds"),
    [
        ({"XDG_CACHE_HOME": "/of/user"}, "/of/user/grpo_jax/compiled", 0.5),
        ({"XDG_CACHE_HOME": "/of/user", "JAX_COMPILATION_CACHE_DIR": "gs://shared"}, None, 0.5),
        (
            {
                "XDG_CACHE_HOME": "/of/user",
                "JAX_COMPILATION_CACHE_DIR": "",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3",
            },
            "/of/user/grpo_jax/compiled",
            None,
        ),
    ],
)
def test_jaxs_own_variables_say_where_programs_are_kept(variables, folder, seconds, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    updated = {}
    monkeypatch.setattr(cli.jax.config, "update", updated.__setitem__)
    cli.use_compile_cache()
    want = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": seconds,
    }
    assert updated == {name: value for name, value in want.items() if value is not None}


@pytest.mark.parametrize(
    ("axis", "size", "traced", "kept"),
    [
        ("data", 2, False, True),
        ("data", 2, True, False),
        ("fsdp", 2, False, False),
        ("sequence", 2, False, False),
        ("tensor", 2, False, False),
        ("tensor", -1, False, False),
        ("tensor", -1, False, "with one device"),
    ],
)
def test_what_a_cpu_does_not_keep(axis, size, traced, kept, monkeypatch):
    mesh, updated = options.default().mesh, {}
    mesh[axis] = size
    if kept == "with one device":
        first, kept = jax.devices()[:1], True
        monkeypatch.setattr(cli.jax, "devices", lambda: first)
    monkeypatch.setattr(cli.jax.config, "update", updated.__setitem__)
    cli.use_compile_cache(mesh, traced=traced)
    assert ("jax_compilation_cache_dir" in updated) == kept
    assert updated.get("jax_enable_compilation_cache", True) == kept


def test_a_stopped_run_has_a_status_of_its_own(capsys):
    def run(argv):
        raise stop.Stopped("Stopped by SIGTERM at step 3")

    with pytest.raises(SystemExit) as info:
        cli.main(run)
    assert info.value.code == 75 and capsys.readouterr().out == "Stopped by SIGTERM at step 3\n"


def test_a_full_disk_is_one_message(capsys):
    def run(argv):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(SystemExit) as info:
        cli.main(run)
    assert info.value.code == 1
    assert capsys.readouterr().err.startswith("error: the disk is full ([Errno 28] No space left")


# --- Which folders are searched -------------------------------------------------------------------


def _path_of(folder, *command: str, **variables: str) -> list[str]:
    """sys.path of a Python that is started in a folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | variables
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def checkout(tmp_path):
    """A folder with this package's beginning, a program in it, and another program that uses it."""
    show = "import json, sys; print(json.dumps(sys.path))"
    folder = tmp_path.resolve() / "checkout"
    for name, text in {
        "grpo_jax/__init__.py": Path(grpo_jax.__file__).read_text(),
        "grpo_jax/show.py": show,
        "grpo_jax_user/__init__.py": "import grpo_jax",
        "grpo_jax_user/show.py": show,
        "show_all.py": f"import grpo_jax\n{show}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_program_leaves_the_current_folder(checkout, tmp_path):
    elsewhere, start = str(tmp_path.resolve()), ("-m", "grpo_jax.show")
    found = _path_of(elsewhere, *start, PYTHONPATH=str(checkout))
    assert found[0] == str(checkout) and elsewhere not in found
    assert _path_of(elsewhere, "-mgrpo_jax.show", "-m", PYTHONPATH=str(checkout)) == found
    assert _path_of(elsewhere, *start, PYTHONPATH=str(checkout), PYTHONSAFEPATH="1") == found
    # In a checkout that is not installed it is found by no other way, and comes last.
    found = _path_of(checkout, *start)
    assert found[-1] == str(checkout) and found.count(str(checkout)) == 1


def test_an_import_changes_no_path(checkout):
    assert _path_of(checkout, "-c", "import grpo_jax.show")[0] == ""
    assert _path_of(checkout, "show_all.py")[0] == str(checkout)
    assert _path_of(checkout, "-m", "grpo_jax_user.show")[0] == str(checkout)
    assert _path_of(checkout, "-m", "show_all", "grpo_jax.show")[0] == str(checkout)


def test_modules_of_rewards_are_found_beside_the_config_and_in_the_current_folder(
    tmp_path, monkeypatch
):
    """After everything else, and only where a name is found nowhere else."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, names in ((here, ("near", "both", "numpy")), (there, ("far", "both"))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}_rewards.py").write_text(f"PLACE = {folder.name!r}")
    (here / "numpy.py").write_text("raise SystemExit")
    shutil.copy(Path(__file__).parent / "helpers" / "tiny_config.py", there / "c.py")
    monkeypatch.chdir(here)
    before = [*sys.path]
    monkeypatch.setattr(sys, "path", [*before])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    file = "../there/c.py"
    load = lambda names: load_config(  # noqa: E731
        file, [f"--config.rewards.names={names}", "--config.rewards.weights=1.0"]
    )
    load("numpy:mean")
    assert sys.path == before
    load("near_rewards:f")
    assert sys.path == [*before, str(there), str(here)]
    load("far_rewards.x:f(a='b:c')")
    assert sys.path == [*before, str(there), str(here)]
    places = [importlib.import_module(f"{name}_rewards").PLACE for name in ("near", "far", "both")]
    assert places == ["here", "there", "there"]


def test_modules_of_environments_and_tools_are_found_there_too(tmp_path, monkeypatch):
    (tmp_path / "near_environment.py").write_text("")
    shutil.copy(Path(__file__).parent / "helpers" / "tiny_config.py", tmp_path / "c.py")
    before = [*sys.path]
    for option in (
        "classes=('near_environment:Class(a=1)',)",
        "classes=('a=near_environment:Class','b=near_environment.x:Other')",
        "tools=('near_environment:tool',)",
    ):
        monkeypatch.setattr(sys, "path", [*before])
        load_config(str(tmp_path / "c.py"), [f"--config.environment.{option}"])
        assert sys.path[: len(before) + 1] == [*before, str(tmp_path)], option
    monkeypatch.setattr(sys, "path", [*before])
    load_config(str(tmp_path / "c.py"), ["--config.environment.classes=('a=json:A','b=json:B')"])
    assert sys.path == before


def test_without_a_home_nothing_is_kept(monkeypatch):
    """A user of a container, in no passwd."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cli.Path, "home", home)
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    updated = {}
    monkeypatch.setattr(cli.jax.config, "update", updated.__setitem__)
    cli.use_compile_cache()
    assert updated == {"jax_enable_compilation_cache": False}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://shared")
    updated.clear()
    cli.use_compile_cache()
    assert updated == {"jax_persistent_cache_min_compile_time_secs": 0.5}


NUMBERS = """
import jax
from grpo_jax import keys, cli as program
def run(argv):
    draws = jax.random.uniform(keys.key_for(0, "rollout"), 3)
    print(draws, draws.dtype, jax.jit(lambda x: x * 1.5)(jax.numpy.arange(3)).dtype)
program.main(run)
"""
VARIABLES = {
    "JAX_ENABLE_X64": "1",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_DISABLE_JIT": "1",
}


def test_no_variable_of_jax_changes_a_number():
    def numbers(more: dict[str, str]) -> str:
        kept = {n: v for n, v in os.environ.items() if n not in VARIABLES}
        done = subprocess.run(
            [sys.executable, "-c", NUMBERS], env=kept | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    plain = numbers({})
    assert "float32 float32" in plain
    assert numbers(VARIABLES) == plain


def test_devices_are_told_and_those_that_are_not_there(monkeypatch):
    told = []
    cli.show_devices(told.append)
    assert told == ["Runs on 8 x cpu."]

    def devices():
        raise AssertionError  # what JAX 0.10.2 has to say of CUDA without its plugin

    monkeypatch.setattr(cli.jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(
        ValueError, match=r"no device of JAX_PLATFORMS = 'cuda'\. Install.*\[cuda13\]"
    ):
        cli.show_devices(told.append)


PRINTS = """
import sys, time
from grpo_jax import cli as program
from grpo_jax.messages.console import say
def run(argv):
    for i in range(2000):
        say(f"line {i} " + "x" * 100)
    open(sys.argv[1], "w").write("to its end")
program.main(run)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])  # "": what is printed is lost by a flush
@pytest.mark.parametrize("gone", ["a reader", "the space"])
def test_what_cannot_be_printed_ends_no_run(tmp_path, gone, unbuffered):
    command = [sys.executable, "-c", PRINTS, str(tmp_path / "out")]
    given = {"stderr": subprocess.PIPE, "env": os.environ | {"PYTHONUNBUFFERED": unbuffered}}
    if gone == "a reader":
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **given)
        process.stdout.readline()
        process.stdout.close()
    else:
        with open("/dev/full", "w") as full:
            process = subprocess.Popen(command, stdout=full, **given)
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 0
    assert (tmp_path / "out").read_text() == "to its end"


LINGERS = """
import sys, threading, time
from grpo_jax import cli as program
program._LINGER_S = 0.2
def run(argv):
    threading.Thread(target=time.sleep, args=[300]).start()
    print("done")
    if sys.argv[1] == "refuses":
        raise ValueError("refused")
program.main(run)
"""


@pytest.mark.parametrize(("how", "status"), [("ends", 0), ("refuses", 1)])
def test_no_thread_keeps_a_program_that_has_ended(how, status):
    """As Orbax's do, which wait for each other for 300 s after a save that failed."""
    done = subprocess.run(
        [sys.executable, "-c", LINGERS, how], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (status, "done\n")
    assert ("error: refused" in done.stderr) == bool(status)


# --- Mistakes, and what is none -------------------------------------------------------------------
TOLD = {
    "ours": ("loading.load('gone.py', [])", 1, False),
    "usage": ("loading.load('quickstart', ['--batch=3'])", 2, False),
    "a library's": ("__import__('numpy').zeros(3).reshape(2, 2)", 1, True),
    "full": ("(_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device'))", 1, True),
}


@pytest.mark.parametrize("case", TOLD)
def test_only_what_may_be_no_mistake_says_how_to_see_more(case, tmp_path, monkeypatch):
    does, status, has_hint = TOLD[case]
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__", "loading": loading, "errno": errno}  # as of a program
    ended, told = refusal(eval(f"lambda argv: {does}", names), [])
    assert ended == status, told
    first, *more = told.splitlines()
    assert first.startswith("error: ")
    assert more == ["(GRPO_JAX_TRACEBACK=1 shows where it was raised.)"] * has_hint


def test_nothing_is_said_of_pytorch_where_it_is_not_installed():
    """transformers does, where it is imported before this package."""
    hide = "import sys; sys.modules['torch'] = None; from importlib import util\n"
    hide += "found = util.find_spec\n"
    hide += "util.find_spec = lambda name, *a: None if name == 'torch' else found(name, *a)\n"
    says = []
    for first in ("import transformers\n", "import grpo_jax\n"):
        code = hide + first + "import grpo_jax.models.policy"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        says.append("PyTorch was not found" in done.stderr)
    assert says == [True, False]
