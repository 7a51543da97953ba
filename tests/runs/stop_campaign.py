"""Stops a run in each of its phases, one of which takes a minute, and goes on.

    python tests/runs/stop_campaign.py --out stops.md

Each phase is made to take `--seconds` by a sleep in its midst, where the main thread hears no
signal (the reward is slow itself). SIGTERM comes a second later. What is measured: the seconds
until the process has ended, its status, the updates that were saved, and whether the run that went
on is the one that was left alone, bit for bit. Nothing is saved before the stop but what that does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_and_resume import final_state, log_differences, state_differences

HERE = Path(__file__).parent
PHASES = (
    "start", "supervised training", "first evaluation", "compiling", "rollout", "rewards",
    "update", "evaluation", "save", "export",
)  # fmt: skip
REWARD = """
import os, time
from pathlib import Path
from grpo_jax.rewards.exact import exact_answer

def slow(trainer_state, **columns):
    marker = Path(os.environ["MARKER"])
    if os.environ["PHASE"] == "rewards" and trainer_state.global_step == 2:
        marker.touch()
        time.sleep(float(os.environ["SECONDS"]))
    return exact_answer(**columns)
"""


def argv(folder: Path) -> list[str]:
    return [
        "--config", str(HERE.parent / "helpers" / "tiny_config.py"), "--workdir", str(folder),
        "--config.rewards.names=['slow_reward:slow','answer_format']",
        "--config.rewards.weights=[1.0,0.5]", "--config.rewards.timeout_s=600",
        "--config.checkpoint.every_steps=0",
    ]  # fmt: skip


# --- The run that is stopped ----------------------------------------------------------------------


def sleep() -> None:
    """A minute in which the main thread hears nothing, once."""
    marker = Path(os.environ["MARKER"])
    if marker.exists():
        return
    marker.touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    time.sleep(float(os.environ["SECONDS"]))


def before(holder, name: str, is_due=lambda *args: True) -> None:
    """Puts the sleep before a function's work."""
    function = getattr(holder, name)

    def call(*args, **kwargs):
        if is_due(*args):
            sleep()
        return function(*args, **kwargs)

    setattr(holder, name, call)


def stretch(phase: str) -> None:
    """Makes a phase long."""
    import jax._src.compiler as compiler

    from grpo_jax.models import policy
    from grpo_jax.models.hf import export
    from grpo_jax.run import checksums
    from grpo_jax.sampling.engine import Engine
    from grpo_jax.trainers import results
    from grpo_jax.trainers.monitor import Monitor

    steps, supervised = [0], [0]
    finished = Monitor.finished

    def counted(monitor, *args):
        count = supervised if monitor._run.engine is None else steps
        count[0] += 1
        return finished(monitor, *args)

    Monitor.finished = counted
    evaluating = [False]
    evaluate = results.evaluate

    def evaluates(*args, **kwargs):
        evaluating[0] = True
        try:
            return evaluate(*args, **kwargs)
        finally:
            evaluating[0] = False

    results.evaluate = evaluates

    def is_gradient(backend, module, *_) -> bool:
        """The largest program, which is compiled after the first rollout."""
        is_policys = supervised[0] == 3
        return is_policys and "gradient" in module.operation.attributes["sym_name"].value

    if phase == "start":
        before(policy, "load_params")
    elif phase == "supervised training":
        before(Monitor, "donates", lambda *_: supervised[0] >= 2)
    elif phase == "first evaluation":
        before(Engine, "_harvest", lambda *_: evaluating[0])
    elif phase == "compiling":
        before(compiler, "compile_or_get_cached", is_gradient)
    elif phase == "rollout":
        before(Engine, "_harvest", lambda *_: steps[0] == 1 and not evaluating[0])
    elif phase == "update":
        before(Monitor, "donates", lambda *_: steps[0] >= 1)
    elif phase == "evaluation":
        before(Engine, "_harvest", lambda *_: steps[0] == 2 and evaluating[0])
    elif phase == "save":
        before(checksums, "write", lambda *_: steps[0] == 4)
    elif phase == "export":
        before(export, "_save_tensors", lambda *_: steps[0] == 4)


def child(phase: str, arguments: list[str]) -> None:
    from grpo_jax import cli, train

    stretch(phase)
    sys.argv[1:] = arguments
    cli.main(train.main)


# --- The campaign ---------------------------------------------------------------------------------


def stopped(phase: str, folder: Path, environment: dict[str, str], seconds: float) -> dict:
    """What a stop in a phase did."""
    marker, log = folder.with_suffix(".marker"), folder.with_suffix(".log")
    environment = environment | {"MARKER": str(marker), "PHASE": phase, "SECONDS": str(seconds)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", phase, *argv(folder)],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while not marker.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(1.0)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    told_after = None
    while process.poll() is None:
        if told_after is None and "stopping, and saving first" in log.read_text():
            told_after = time.monotonic() - began
        time.sleep(0.02)
    ended_after = time.monotonic() - began
    text = log.read_text()
    saved = 0
    if any((folder / "checkpoints").glob("[0-9]*")):
        saved = int(final_state(folder)["/num_updates"])
    told = re.findall(r"^Stopped by .*", text, re.M)
    return {
        "phase": phase, "told": told_after, "ended": ended_after, "status": process.returncode,
        "saved": saved, "message": told[-1] if told else text[-300:],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--phases", nargs="*", default=PHASES)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="stops_"))
    (root / "slow_reward.py").write_text(REWARD)
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(root / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PHASE": "",
        "MARKER": str(root / "none"), "SECONDS": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "grpo_jax.train"]
    subprocess.run([*command, *argv(root / "whole")], env=environment, check=True)
    lines = [
        "| phase | told after, s | ended after, s | status | updates saved | went on | message |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for phase in args.phases:
        folder = root / phase.replace(" ", "_")
        found = stopped(phase, folder, environment, args.seconds)
        subprocess.run([*command, *argv(folder)], env=environment, check=True)
        differences = state_differences(root / "whole", folder)
        differences += log_differences(root / "whole", folder)
        equal = "equal bit for bit" if not differences else str(differences[:2])
        told = "-" if found["told"] is None else f"{found['told']:.1f}"
        message = found["message"].replace(str(folder), "DIR")
        lines.append(
            f"| {phase} | {told} | {found['ended']:.1f} | {found['status']} | {found['saved']} | "
            f"{equal} | `{message}` |"
        )
        print(lines[-1], flush=True)
        print(json.dumps(found), flush=True)
    Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
