"""Runs of several processes on this machine against the same run of one, and what ends them.

launch/local_multiprocess.sh starts the processes. The first compiles for all: tracing takes each of
them as long again. Runs of one process are made in this one. Float rounding alone may differ:
another number of devices adds in another order. The optimizer's epsilon keeps Adam from turning
that into whole steps.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from kill_and_resume import differences_beyond, final_state, logged
from mistakes import make_chats

HELPERS = Path(__file__).parents[1] / "helpers"
DRIVE = str(HELPERS / "drive.py")
LAUNCH = HELPERS.parents[1] / "launch" / "local_multiprocess.sh"
STEPS = 5
OPTIONS = [
    "--config.batch.prompts=8",
    "--config.batch.minibatches=1",
    f"--config.loop.num_steps={STEPS}",
    "--config.optim.eps=100.0",
    "--config.optim.learning_rate=50.0",
    "--config.sft.num_steps=1",
    "--config.sft.warmup_steps=0",
    "--config.checkpoint.every_steps=1",
    "--config.logging.tensorboard=False",
    "--config.rollout.compact=False",
]
# A reward that can be slowed down without changing the config, so that a run lasts.
SLOW = """
import os, time
from grpo_jax.rewards.exact import exact_answer

def slow(**columns):
    time.sleep(float(os.environ.get("SLEEP_S", "0")))
    return exact_answer(**columns)

def digit(completions, **columns):  # right for about one of three
    return [float(c[:1] in "0123") for c in completions]
"""
# Says a random digit after a turn, twice; what the turns say is worth something.
ECHO = """
import random

class Echo:
    def reset(self, **row):
        self.said = []

    def respond(self, messages):
        said = messages[-1]
        self.said.append(said.get("reasoning_content", "") + said["content"])
        return None if len(self.said) > 2 else str(random.randrange(10))

    def get_reward(self):
        return sum(ord(c) for turn in self.said for c in turn) % 11 / 10
"""
SLOW_REWARD = [
    "--config.rewards.names=['slow_reward:slow','answer_format']",
    "--config.rewards.weights=[1.0,0.5]",
]


def argv(folder: Path, *more: str) -> list[str]:
    config = str(HELPERS / "tiny_config.py")
    return ["--config", config, "--workdir", str(folder), *OPTIONS, *SLOW_REWARD, *more]


class Launched:
    """A run of several processes that was started, and its output."""

    def __init__(
        self,
        num: int,
        folder: Path,
        *more: str,
        environment,
        devices: int = 1,
        by: str = "",
        command: Sequence[str] = (),
    ):
        """`by` "bash": each process fills in the variables that the arguments name.

        `command`: what is run in place of a training.
        """
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}_{time.monotonic_ns()}.log")
        flags = environment.get("XLA_FLAGS", "")
        flags += f" --xla_force_host_platform_device_count={devices}"
        if by == "bash":
            command = [sys.executable, "-m", "grpo_jax.train", *argv(folder, *more)]
            command = ["bash", "-c", " ".join(f'"{argument}"' for argument in command)]
        else:
            job = {"argv": argv(folder, *more), "command": True, "plain": True}
            command = [sys.executable, *(command or [DRIVE, json.dumps([job])])]
        programs = self.log.with_suffix(".programs")
        programs.mkdir()
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [str(LAUNCH), str(num), *command],
                env=environment | {"XLA_FLAGS": flags, "GRPO_JAX_TEST_TOGETHER": str(programs)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def status(self, timeout_s: float = 600) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            pytest.fail(f"still running after {timeout_s} s:\n{self.output[-4000:]}")

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 600) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.05)

    def pid(self, number: int) -> int:
        """The process of that number: the child whose environment says so."""
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        for pid in children.stdout.split():
            variables: list[bytes] = []
            with contextlib.suppress(OSError):  # the launcher's `sleep`, which has ended meanwhile
                variables = Path("/proc", pid, "environ").read_bytes().split(b"\0")
            if f"JAX_PROCESS_ID={number}".encode() in variables:
                return int(pid)
        raise AssertionError(f"no process {number}: {self.output[-4000:]}")


def has_step(folder: Path, step: int) -> bool:
    """Whether a run has written that step."""
    file = folder / "metrics.jsonl"
    return file.exists() and any(r["step"] >= step and "reward" in r for r in logged(folder))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory) -> Iterator[Path]:
    """Where this process finds the rewards and the environment, too."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "slow_reward.py").write_text(SLOW)
    (folder / "echo.py").write_text(ECHO)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in ("slow_reward", "echo"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def environment(reward_folder, alone) -> dict[str, str]:
    paths = [str(reward_folder), os.environ.get("PYTHONPATH", "")]
    kept = {n: v for n, v in alone.items() if n != "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="module")
def one(tmp_path_factory, reward_folder, runs_here) -> Path:
    """The folder of a run of one process with one device."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    runs_here("train", argv(folder))
    return folder


# --- Each kind of run: of one process, and of a pair of them that does one after another ----------

HALVES = ["mesh.data=1", "mesh.fsdp=2"]  # of every weight on each of two devices
BARE = ["evaluation.num_problems=0", "checkpoint.every_steps=0"]
HYBRID = [
    *("data.task=unseen_form", "rollout.max_tokens=40", *BARE),
    *("rewards.names=['slow_reward:digit']", "rewards.weights=[1.0]"),
]
CONVERSATIONS = [
    *("environment.classes=['echo:Echo']", "environment.turn_tokens=5", "environment.max_turns=3"),
    *("environment.observation_tokens=8", "rollout.max_tokens=24", "loop.num_steps=2", *BARE),
    *("rewards.names=['environment:Echo']", "rewards.weights=[1.0]"),
]
FORKS = [
    *("environment.history=fork", "rollout.max_tokens=96", "algorithm.kl_coef=0.0"),
    *("data.task=", "data.chat=True", "data.max_prompt_tokens=48", "data.num_eval=0"),
    *("sft.num_steps=0", "sft.warmup_steps=0"),
]
# The program; options of every one, and of the pair. All but the first begin with the model of
# `one`, and hybrids of another task with that of "uft". One of them trains adapters.
KINDS: dict[str, tuple[str, list[str], list[str]]] = {
    "grpo": ("train", [], []),
    "preferences": ("dpo", [
        *("preference.loss=kto", "preference.num_steps=5", "preference.batch=8"),
        *("preference.max_tokens=56", "preference.learning_rate=50.0", "preference.beta=0.5"),
        *("preference.checkpoint_every_steps=0", "preference.evaluate_every_steps=2"),
    ], []),
    "reward model": ("reward_model", [
        *(f"reward_model.num_steps={STEPS}", "reward_model.batch=8"),
        *("reward_model.max_tokens=56", "reward_model.learning_rate=50.0"),
        "reward_model.checkpoint_every_steps=0",
    ], HALVES),
    "ppo": ("train", [
        *("algorithm.preset=ppo", "critic.learning_rate=50.0"),
        *("evaluation.every_steps=0", "checkpoint.every_steps=0"),
    ], HALVES),
    "changing": ("train", [
        *("algorithm.kl_target=0.01", "algorithm.kl_horizon=100", "algorithm.entropy_target=5.0"),
        *("algorithm.reference_refresh_steps=2", "algorithm.top_entropy_share=0.5"),
        *("rewards.names=['slow_reward:digit']", "rewards.weights=[1.0]"),
        *("prompts.drop_equal_groups=True", "prompts.per_draw=4", "prompts.oversample=1.5"),
        "evaluation.num_problems=0",
    ], HALVES),
    "uft": ("train", [*HYBRID, "hybrid.method=uft", "hybrid.hint_steps=4"], HALVES),
    "chord": (
        "train", [*HYBRID, "hybrid.method=chord", "hybrid.mix_decay_steps=4", "lora.rank=4"], HALVES
    ),
    "conversations": ("train", CONVERSATIONS, []),
    "forks": ("train", [*CONVERSATIONS, *FORKS], ["mesh.data=1", "mesh.tensor=2"]),
    "stopped": ("train", BARE, []),
    "killed": ("train", BARE, []),
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, one) -> Callable[..., list[str]]:
    """Arguments of the program of a kind, of 1 process or of 2."""
    root = tmp_path_factory.mktemp("kinds")
    chats, questions = make_chats(root / "chats")

    def of(kind: str, way: int, *more: str) -> list[str]:
        _, options, of_pair = KINDS[kind]
        begun = root / "uft 1" if kind in ("chord", "uft") else one
        if kind == "forks":
            options = [f"model.path={chats}", f"data.path={questions}", *options]
        elif (kind, way) != ("uft", 1) and kind != "grpo":
            options = [f"model.path={begun / 'bootstrap' / 'export'}", *options]
        if kind == "ppo":
            model = root / "reward model 1" / "export"
            options += [
                f"critic.path={model}",
                f"rewards.names={[f'model:{model}', 'answer_format']}",
            ]
        options += {1: [], 2: of_pair}[way] + list(more)
        return argv(root / f"{kind} {way}", *(f"--config.{option}" for option in options))

    return of


def folder_of(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--workdir") + 1])


@pytest.fixture(scope="module")
def alone_of(arguments, one, runs_here) -> Callable[[str], Path]:
    """The folder of a kind's run of one process, which is made once."""

    @functools.cache
    def of(kind: str) -> Path:
        if kind in ("grpo", "stopped"):
            return one
        runs_here(KINDS[kind][0], arguments(kind, 1))
        return folder_of(arguments(kind, 1))

    return of


@pytest.fixture(scope="module")
def stopped(one, environment, tmp_path_factory) -> Launched:
    """A run of two of four devices each, of which the second was asked to stop."""
    folder, slowly = tmp_path_factory.mktemp("eight") / "run", environment | {"SLEEP_S": "0.5"}
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
    run = Launched(2, folder, *gone_on(one), *mesh, environment=slowly, devices=4)
    run.wait_until(lambda: has_step(folder, 1))
    os.kill(run.pid(1), signal.SIGTERM)
    assert run.status() == 75, run.output
    return run


def gone_on(one: Path) -> list[str]:
    """The options with which the stopped run began."""
    options = [f"model.path={one / 'bootstrap' / 'export'}", *BARE]
    return [f"--config.{option}" for option in options]


class Pair(NamedTuple):
    """What two processes did."""

    folder: Callable[[str], Path]  # of a kind
    output: str
    status: int  # of the launcher
    survivor: int  # the process that was not killed


@pytest.fixture(scope="module")
def pair(arguments, alone_of, stopped, environment, tmp_path_factory) -> Pair:
    """Runs all kinds by two processes, each after another.

    One of them stops after a refresh of its reference, and goes on. The last but one goes on with
    `stopped`. In the last, the second process is killed.
    """
    for kind in ("reward model", "uft"):
        alone_of(kind)  # with which PPO and hybrids begin
    folder = lambda kind: folder_of(arguments(kind, 2))  # noqa: E731
    shutil.copytree(stopped.folder, folder("stopped"))
    jobs = [(kind, []) for kind in KINDS]
    jobs.insert(list(KINDS).index("changing"), ("changing", ["loop.num_steps=3"]))
    asked = [{"argv": arguments(kind, 2, *more), "program": KINDS[kind][0]} for kind, more in jobs]
    asked[-1] |= {"environment": {"SLEEP_S": "0.5"}, "command": True}
    run = Launched(
        2, tmp_path_factory.mktemp("pair") / "pair", environment=environment,
        command=[DRIVE, json.dumps(asked)],
    )  # fmt: skip
    run.wait_until(lambda: has_step(folder("killed"), 1), len(jobs) * 300)
    survivor = run.pid(0)
    os.kill(run.pid(1), signal.SIGKILL)
    status = run.status()
    ends = [json.loads(line) for line in re.findall(r"^\[0\] (\{\"end\".*)$", run.output, re.M)]
    assert ends == [{"end": "finished"}] * (len(jobs) - 1), run.output
    assert run.output.count("Continuing") == 2
    return Pair(folder, run.output, status, survivor)


def test_two_processes_do_what_one_does(one, pair):
    folder = pair.folder("grpo")
    assert differences_beyond(1e-5, one, folder) == []
    norms = [row["policy/grad_norm"] for row in logged(folder) if "reward" in row]
    assert len(norms) == STEPS and min(norms) > 1e-3  # there was something to differ in
    for name in ("evaluations", "export", "bootstrap/export"):
        files = [sorted(p.name for p in (f / name).iterdir()) for f in (one, folder)]
        assert files[0] == files[1]
    evaluated = [
        [json.loads(line)["completion"] for line in sorted((f / "evaluations").iterdir())[0].open()]
        for f in (one, folder)
    ]
    assert len(evaluated[0]) == 8 and evaluated[0] == evaluated[1]
    # What is written and shown for all comes from process 0.
    first = pair.output.partition('[0] {"end"')[0]
    assert len(re.findall(rf"^\[0\] step {STEPS}/{STEPS}", first, re.M)) == 1
    assert not re.search(r"^\[1\] (step|sft|Completions)", pair.output, re.M)


@pytest.mark.slow
def test_preferences_of_two_processes_are_those_of_one(alone_of, pair):
    """Both score the reference's part of the data; the numbers of the first are kept."""
    folders = alone_of("preferences"), pair.folder("preferences")
    assert differences_beyond(1e-5, *folders) == []
    assert (folders[1] / "reference.npz").exists()
    losses = [row["preference/loss"] for row in logged(folders[1]) if "preference/loss" in row]
    assert len(losses) == STEPS and len(set(losses)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("reward model", "reward_model/loss"), ("ppo", "value/loss")]
)
def test_a_reward_model_and_ppo_with_it_are_those_of_one(alone_of, pair, kind, name):
    """The weights are divided; on eight devices: tests/learner/test_scalar_updates.py."""
    one, other = alone_of(kind), pair.folder(kind)
    lines = [row for row in logged(one) if name in row]
    assert len(lines) == STEPS
    left, right = final_state(one), final_state(other)
    assert left.keys() == right.keys()
    assert [n for n in left if not np.allclose(left[n], right[n], rtol=0, atol=1e-5)] == []
    for a, b in zip(lines, [row for row in logged(other) if name in row], strict=True):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4)
        assert a["policy/grad_norm"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chord", "uft"])
def test_a_hybrid_of_two_processes_is_that_of_one(alone_of, pair, method):
    """Each process has its part of the demonstrations; the weights are divided.

    CHORD trains adapters: their base is read by both, each its part, and both merge the export.
    """
    folders = alone_of(method), pair.folder(method)
    assert differences_beyond(1e-5, *folders) == []
    rows = [[r for r in logged(folder) if "reward" in r] for folder in folders]
    name = "hybrid/mix" if method == "chord" else "hybrid/hint_tokens"
    assert len({row[name] for row in rows[0]}) > 2
    for a, b in zip(*rows, strict=True):
        assert a[name] == b[name]
        assert a["hybrid/loss"] == pytest.approx(b["hybrid/loss"], rel=1e-4)
        assert min(a["policy/grad_norm"], b["policy/grad_norm"]) > 1e-3
    adapters = [sorted(p.name for p in f.glob("export/adapter/*")) for f in folders]
    of_lora = ["adapter_config.json", "adapter_model.safetensors"]
    assert adapters == [of_lora if method == "chord" else []] * 2


@pytest.mark.slow
def test_an_objective_that_changes_is_that_of_one(alone_of, pair):
    """Two processes, each with half of every weight, stop after a refresh of the reference.

    They refill their batches: a group may be learned from on another process than the one that has
    sampled it.
    """
    folders = alone_of("changing"), pair.folder("changing")
    assert differences_beyond(1e-5, *folders) == []
    rows = [row for row in logged(folders[1]) if "reward" in row]
    assert len({row["policy/kl_coef"] for row in rows}) == STEPS
    assert {row["groups/equal_share"] for row in rows} == {0}
    assert sum(row["groups/dropped"] for row in rows) > 0
    assert min(row["policy/grad_norm"] for row in rows) > 1e-3


@pytest.mark.slow
def test_conversations_of_two_processes_are_those_of_one(alone_of, pair):
    """Each process has the environments of its own groups."""
    folders = alone_of("conversations"), pair.folder("conversations")
    assert differences_beyond(1e-5, *folders) == []
    rows = [row for row in logged(pair.folder("conversations")) if "reward" in row]
    assert [row["environment/processes"] for row in rows] == [32, 32]
    assert min(row["environment/turns"] for row in rows) > 1.5


@pytest.mark.slow
def test_conversations_that_fork_are_those_of_one(alone_of, pair):
    """A shard's devices are of both processes, which both hold every episode.

    Each has its own environments and renderer.
    """
    folders = alone_of("forks"), pair.folder("forks")
    assert differences_beyond(1e-5, *folders) == []
    for one, two in zip(*(map(grpo_rows, folders)), strict=True):
        assert one["environment/forks"] == two["environment/forks"] > 1
        assert one["environment/rewritten_tokens"] == two["environment/rewritten_tokens"] > 20
        assert min(one["policy/grad_norm"], two["policy/grad_norm"]) > 1e-3


def grpo_rows(folder: Path) -> list[dict]:
    return [row for row in logged(folder) if "reward" in row]


# --- Stopped, killed, refused ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_others_go_on(
    one, stopped, pair, tmp_path, environment, runs_here
):
    """Two of four devices each are stopped at one step. Then one of eight devices goes on, two of
    one device, and four on another mesh: all end as one would have."""
    told = re.search(r"^\[0\] Stopped by SIGTERM at step (\d)", stopped.output, re.M)
    assert told and 1 <= int(told[1]) < STEPS, stopped.output
    assert differences_beyond(1e-5, one, pair.folder("stopped")) == []

    folder = shutil.copytree(stopped.folder, tmp_path / "1")
    told = runs_here("train", argv(folder, *gone_on(one), "--config.mesh.fsdp=8"), devices=8)
    assert "Continuing" in told
    assert differences_beyond(1e-5, one, folder) == []
    folder = shutil.copytree(stopped.folder, tmp_path / "4")
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    then = Launched(4, folder, *gone_on(one), *mesh, environment=environment)
    assert then.status() == 0 and "Continuing" in then.output, then.output
    assert differences_beyond(1e-5, one, folder) == []


@pytest.mark.slow
def test_a_killed_process_ends_all_and_is_named(pair):
    assert pair.status == 137, pair.output
    assert "local_multiprocess: process 1 of 2 was ended by SIGKILL" in pair.output
    told = r"^\[0\] error: process 0 \(.+\) ends, because process 1 \(.+\) died without a word"
    assert re.search(told, pair.output, re.M), pair.output
    assert not Path("/proc", str(pair.survivor)).exists()


@pytest.mark.slow
def test_what_one_process_refuses_is_told_by_all(tmp_path, environment):
    """Here a workdir that is not shared."""
    run = Launched(2, tmp_path / "$JAX_PROCESS_ID", environment=environment, by="bash")
    assert run.status() == 1, run.output
    assert re.search(r"^\[1\] error: --workdir \S+/1 of this host is not that of", run.output, re.M)
    told = r"^\[0\] error: process 0 ends, because process 1 \(.+\) ended: --workdir"
    assert re.search(told, run.output, re.M), run.output
