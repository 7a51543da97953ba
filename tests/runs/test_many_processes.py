"""Runs of several processes on this machine against the same run of one, and what ends them.

All are started by launch/local_multiprocess.sh. Float rounding alone may differ: another number of
devices adds in another order. The optimizer's epsilon keeps Adam from turning that into whole
steps.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kill_and_resume import differences_beyond, final_state, logged

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch" / "local_multiprocess.sh"
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
# Says a random digit after a turn, twice.
ECHO = """
import random

class Echo:
    def reset(self, **row):
        self.said = []

    def respond(self, messages):
        self.said.append(messages[-1]["content"])
        return None if len(self.said) > 2 else str(random.randrange(10))

    def get_reward(self):
        return sum(c.isdigit() for turn in self.said for c in turn) / 10
"""
SLOW_REWARD = [
    "--config.rewards.names=['slow_reward:slow','answer_format']",
    "--config.rewards.weights=[1.0,0.5]",
]


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
        program: str = "train",
    ):
        """`by` "bash": each process fills in the variables that the arguments name."""
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}_{time.monotonic_ns()}.log")
        flags = environment.get("XLA_FLAGS", "")
        flags += f" --xla_force_host_platform_device_count={devices}"
        command = [
            sys.executable,
            "-m",
            f"grpo_jax.{program}",
            "--config",
            str(HERE.parent / "helpers" / "tiny_config.py"),
        ]
        command += ["--workdir", str(folder), *OPTIONS, *SLOW_REWARD, *more]
        if by == "bash":
            command = ["bash", "-c", " ".join(f'"{argument}"' for argument in command)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [str(LAUNCH), str(num), *command],
                env=environment | {"XLA_FLAGS": flags},
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

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.05)

    def pid(self, number: int) -> int:
        """The process of that number: the child whose environment says so."""
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        for pid in children.stdout.split():
            variables = Path("/proc", pid, "environ").read_bytes().split(b"\0")
            if f"JAX_PROCESS_ID={number}".encode() in variables:
                return int(pid)
        raise AssertionError(f"no process {number}: {self.output[-4000:]}")

    def has_step(self, step: int) -> bool:
        file = self.folder / "metrics.jsonl"
        return file.exists() and any(
            r["step"] >= step and "reward" in r for r in logged(self.folder)
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory, alone) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "slow_reward.py").write_text(SLOW)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    kept = {n: v for n, v in alone.items() if n != "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="module")
def one(tmp_path_factory, environment) -> Path:
    """The folder of a run of one process with one device."""
    run = Launched(1, tmp_path_factory.mktemp("runs") / "one", environment=environment)
    assert run.status() == 0, run.output
    return run.folder


def test_two_processes_do_what_one_does(one, tmp_path, environment):
    run = Launched(2, tmp_path / "two", environment=environment)
    assert run.status() == 0, run.output
    assert differences_beyond(1e-5, one, run.folder) == []
    norms = [row["policy/grad_norm"] for row in logged(run.folder) if "reward" in row]
    assert len(norms) == STEPS and min(norms) > 1e-3  # there was something to differ in
    for name in ("evaluations", "export", "bootstrap/export"):
        files = [sorted(p.name for p in (f / name).iterdir()) for f in (one, run.folder)]
        assert files[0] == files[1]
    evaluated = [
        [json.loads(line)["completion"] for line in sorted((f / "evaluations").iterdir())[0].open()]
        for f in (one, run.folder)
    ]
    assert len(evaluated[0]) == 8 and evaluated[0] == evaluated[1]
    # What is written and shown for all comes from process 0.
    assert len(re.findall(rf"^\[0\] step {STEPS}/{STEPS}", run.output, re.M)) == 1
    assert not re.search(r"^\[1\] (step|sft|Completions)", run.output, re.M)


@pytest.mark.slow
def test_preferences_of_two_processes_are_those_of_one(one, tmp_path, environment):
    """Both score the reference's part of the data; the numbers of the first are kept."""
    more = [
        f"--config.model.path={one / 'bootstrap' / 'export'}",
        *(f"--config.preference.{option}" for option in (
            "loss=kto", "num_steps=5", "batch=8", "max_tokens=56", "learning_rate=50.0",
            "beta=0.5", "checkpoint_every_steps=0", "evaluate_every_steps=2",
        )),
    ]  # fmt: skip
    folders = []
    for num in (1, 2):
        folder = tmp_path / f"{num}"
        run = Launched(num, folder, *more, environment=environment, program="dpo")
        assert run.status() == 0, run.output
        folders.append(run.folder)
    assert differences_beyond(1e-5, *folders) == []
    assert (folders[1] / "reference.npz").exists()
    losses = [row["preference/loss"] for row in logged(folders[1]) if "preference/loss" in row]
    assert len(losses) == STEPS and len(set(losses)) == STEPS


@pytest.mark.slow
def test_a_reward_model_and_ppo_with_it_are_those_of_one(one, tmp_path, environment):
    """Two processes, which divide the weights, and eight devices of one process."""
    model = f"--config.model.path={one / 'bootstrap' / 'export'}"
    of_model = [
        f"--config.reward_model.num_steps={STEPS}",
        "--config.reward_model.batch=8",
        "--config.reward_model.max_tokens=56",
        "--config.reward_model.learning_rate=50.0",
        "--config.reward_model.checkpoint_every_steps=0",
    ]
    names = [f"model:{tmp_path / 'rm 1' / 'export'}", "answer_format"]
    of_ppo = [
        "--config.algorithm.preset=ppo",
        f"--config.critic.path={tmp_path / 'rm 1' / 'export'}",
        "--config.critic.learning_rate=50.0",
        f"--config.rewards.names={names}",
        "--config.evaluation.every_steps=0",
        "--config.checkpoint.every_steps=0",
    ]
    ways = {
        "1": (1, 1, []),
        "2": (2, 1, ["--config.mesh.data=1", "--config.mesh.fsdp=2"]),
        "8": (1, 8, ["--config.mesh.data=4", "--config.mesh.fsdp=2"]),
    }
    for way, (num, devices, mesh) in ways.items():
        for kind, program, more in (("rm", "reward_model", of_model), ("ppo", "train", of_ppo)):
            run = Launched(
                num, tmp_path / f"{kind} {way}", model, *more, *mesh,
                environment=environment, devices=devices, program=program,
            )  # fmt: skip
            assert run.status() == 0, run.output
    for way in ("2", "8"):
        for kind in ("rm", "ppo"):
            folders = tmp_path / f"{kind} 1", tmp_path / f"{kind} {way}"
            left, right = map(final_state, folders)
            assert left.keys() == right.keys()
            far = [n for n in left if not np.allclose(left[n], right[n], rtol=0, atol=1e-5)]
            assert far == [], (kind, way)
    for kind, name in (("rm", "reward_model/loss"), ("ppo", "value/loss")):
        lines = [[r for r in logged(tmp_path / f"{kind} {w}") if name in r] for w in ways]
        assert len(lines[0]) == STEPS
        for other in lines[1:]:
            for a, b in zip(lines[0], other, strict=True):
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4)
                assert a["policy/grad_norm"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chord", "uft"])
def test_a_hybrid_of_two_processes_is_that_of_one(one, tmp_path, environment, method):
    """Each process has its part of the demonstrations; the weights are divided."""
    more = [
        "--config.data.task=unseen_form",
        "--config.rewards.names=['slow_reward:digit']",
        "--config.rewards.weights=[1.0]",
        "--config.rollout.max_tokens=40",
        f"--config.hybrid.method={method}",
        f"--config.hybrid.{'mix_decay_steps' if method == 'chord' else 'hint_steps'}=4",
        "--config.evaluation.num_problems=0",
        "--config.checkpoint.every_steps=0",
    ]
    folders, mesh = [], ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    for num in (1, 2):
        run = Launched(num, tmp_path / f"{num}", *more, *mesh[: 2 * num - 2],
                       environment=environment)  # fmt: skip
        assert run.status() == 0, run.output
        folders.append(run.folder)
        more.append(f"--config.model.path={folders[0] / 'bootstrap' / 'export'}")
    assert differences_beyond(1e-5, *folders) == []
    rows = [[r for r in logged(folder) if "reward" in r] for folder in folders]
    name = "hybrid/mix" if method == "chord" else "hybrid/hint_tokens"
    assert len({row[name] for row in rows[0]}) > 2
    for a, b in zip(*rows, strict=True):
        assert a[name] == b[name]
        assert a["hybrid/loss"] == pytest.approx(b["hybrid/loss"], rel=1e-4)
        assert min(a["policy/grad_norm"], b["policy/grad_norm"]) > 1e-3


@pytest.mark.slow
def test_adapters_of_two_processes_are_those_of_one(one, tmp_path, environment):
    """Their base is read by both, each its part; the export is merged by both."""
    more = [
        f"--config.model.path={one / 'bootstrap' / 'export'}",
        "--config.lora.rank=4",
        "--config.evaluation.num_problems=0",
        "--config.checkpoint.every_steps=0",
    ]
    folders = []
    for num, mesh in ((1, []), (2, ["--config.mesh.data=1", "--config.mesh.fsdp=2"])):
        run = Launched(num, tmp_path / f"{num}", *more, *mesh, environment=environment)
        assert run.status() == 0, run.output
        folders.append(run.folder)
    assert differences_beyond(1e-5, *folders) == []
    norms = [row["policy/grad_norm"] for row in logged(folders[1]) if "reward" in row]
    assert len(norms) == STEPS and min(norms) > 1e-3
    files = [sorted(p.name for p in (f / "export" / "adapter").iterdir()) for f in folders]
    assert files[0] == files[1] == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_an_objective_that_changes_is_that_of_one(one, tmp_path, environment):
    """Two processes, each with half of every weight, stop after a refresh of the reference."""
    more = [
        f"--config.model.path={one / 'bootstrap' / 'export'}",
        "--config.evaluation.num_problems=0",
        "--config.algorithm.kl_target=0.01",
        "--config.algorithm.kl_horizon=100",
        "--config.algorithm.entropy_target=5.0",
        "--config.algorithm.reference_refresh_steps=2",
        "--config.algorithm.top_entropy_share=0.5",
    ]
    alone = Launched(1, tmp_path / "alone", *more, environment=environment)
    assert alone.status() == 0, alone.output
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    for steps in (3, STEPS):
        more.append(f"--config.loop.num_steps={steps}")
        run = Launched(2, tmp_path / "two", *more, *mesh, environment=environment)
        assert run.status() == 0, run.output
    assert "Continuing" in run.output
    assert differences_beyond(1e-5, alone.folder, run.folder) == []
    coefs = [row["policy/kl_coef"] for row in logged(run.folder) if "reward" in row]
    assert len(set(coefs)) == STEPS


@pytest.mark.slow
def test_two_processes_refill_a_batch_as_one_does(one, tmp_path, environment):
    """A group may be learned from on another process than the one that has sampled it."""
    more = [
        f"--config.model.path={one / 'bootstrap' / 'export'}",
        "--config.rewards.names=['slow_reward:digit']",
        "--config.rewards.weights=[1.0]",
        "--config.prompts.drop_equal_groups=True",
        "--config.prompts.per_draw=4",
        "--config.evaluation.num_problems=0",
        "--config.checkpoint.every_steps=0",
    ]
    folders = []
    for num in (1, 2):
        run = Launched(num, tmp_path / f"{num}", *more, environment=environment)
        assert run.status() == 0, run.output
        folders.append(run.folder)
    assert differences_beyond(1e-5, *folders) == []
    rows = [row for row in logged(folders[1]) if "reward" in row]
    assert {row["groups/equal_share"] for row in rows} == {0}
    assert sum(row["groups/dropped"] for row in rows) > 0
    assert min(row["policy/grad_norm"] for row in rows) > 1e-3


@pytest.mark.slow
def test_conversations_of_two_processes_are_those_of_one(one, tmp_path, environment):
    """Each process has the environments of its own groups; a shard's devices are of both, too."""
    (tmp_path / "echo.py").write_text(ECHO)
    environment = environment | {"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"}
    more = [
        f"--config.model.path={one / 'bootstrap' / 'export'}",
        "--config.environment.classes=['echo:Echo']",
        "--config.environment.turn_tokens=5",
        "--config.environment.max_turns=3",
        "--config.environment.observation_tokens=8",
        "--config.rollout.max_tokens=24",
        "--config.rewards.names=['environment:Echo']",
        "--config.rewards.weights=[1.0]",
        "--config.evaluation.num_problems=0",
        "--config.checkpoint.every_steps=0",
        "--config.loop.num_steps=2",
    ]
    folders, meshes = [], ([], [], ["--config.mesh.data=1", "--config.mesh.tensor=2"])
    for number, mesh in enumerate(meshes):
        run = Launched(
            min(number + 1, 2), tmp_path / f"{number}", *more, *mesh, environment=environment
        )
        assert run.status() == 0, run.output
        folders.append(run.folder)
    for folder in folders[1:]:
        assert differences_beyond(1e-5, folders[0], folder) == []
    rows = [row for row in logged(folders[1]) if "reward" in row]
    assert [row["environment/processes"] for row in rows] == [32, 32]
    assert min(row["environment/turns"] for row in rows) > 1.5


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_four_go_on(one, tmp_path, environment):
    """Two processes are stopped at one step; four, on another mesh, end as one would have."""
    more = [
        f"--config.model.path={one / 'bootstrap' / 'export'}",
        "--config.evaluation.num_problems=0",
        "--config.checkpoint.every_steps=0",
    ]
    run = Launched(2, tmp_path / "run", *more, environment=environment | {"SLEEP_S": "0.5"})
    run.wait_until(lambda: run.has_step(1))
    os.kill(run.pid(1), signal.SIGTERM)
    assert run.status() == 75, run.output
    stopped = re.search(r"^\[0\] Stopped by SIGTERM at step (\d)", run.output, re.M)
    assert stopped and 1 <= int(stopped[1]) < STEPS, run.output
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    then = Launched(4, run.folder, *more, *mesh, environment=environment)
    assert then.status() == 0 and "Continuing" in then.output, then.output
    assert differences_beyond(1e-5, one, run.folder) == []


@pytest.mark.slow
def test_one_process_and_two_go_on_where_two_of_four_devices_stopped(one, tmp_path, environment):
    """Then eight devices of one, and of two processes one each."""
    more = [
        f"--config.model.path={one / 'bootstrap' / 'export'}",
        "--config.evaluation.num_problems=0",
        "--config.checkpoint.every_steps=0",
    ]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
    slowly = environment | {"SLEEP_S": "0.5"}
    run = Launched(2, tmp_path / "eight", *more, *mesh, environment=slowly, devices=4)
    run.wait_until(lambda: run.has_step(1))
    os.kill(run.pid(0), signal.SIGTERM)
    assert run.status() == 75, run.output
    stopped = re.search(r"^\[0\] Stopped by SIGTERM at step (\d)", run.output, re.M)
    assert stopped and 1 <= int(stopped[1]) < STEPS, run.output
    for num, devices, mesh in ((1, 8, ["--config.mesh.fsdp=8"]), (2, 1, [])):
        folder = shutil.copytree(run.folder, tmp_path / f"{num}")
        then = Launched(num, folder, *more, *mesh, environment=environment, devices=devices)
        assert then.status() == 0 and "Continuing" in then.output, then.output
        assert differences_beyond(1e-5, one, folder) == []


@pytest.mark.slow
def test_a_killed_process_ends_all_and_is_named(tmp_path, environment):
    run = Launched(2, tmp_path / "run", environment=environment | {"SLEEP_S": "0.5"})
    run.wait_until(lambda: run.has_step(1))
    other = run.pid(0)
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.status() == 137, run.output
    assert "local_multiprocess: process 1 of 2 was ended by SIGKILL" in run.output
    told = r"^\[0\] error: process 0 \(.+\) ends, because process 1 \(.+\) died without a word"
    assert re.search(told, run.output, re.M), run.output
    assert not Path("/proc", str(other)).exists()


@pytest.mark.slow
def test_what_one_process_refuses_is_told_by_all(tmp_path, environment):
    """Here a workdir that is not shared."""
    run = Launched(2, tmp_path / "$JAX_PROCESS_ID", environment=environment, by="bash")
    assert run.status() == 1, run.output
    assert re.search(r"^\[1\] error: --workdir \S+/1 of this host is not that of", run.output, re.M)
    told = r"^\[0\] error: process 0 ends, because process 1 \(.+\) ended: --workdir"
    assert re.search(told, run.output, re.M), run.output
