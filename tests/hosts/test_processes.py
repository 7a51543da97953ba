"""How a process finds the others of its run; tests/runs/test_many_processes.py has them at work."""

from __future__ import annotations

import re
import socket
import threading
import time

import jax
import pytest

from grpo_jax.hosts import processes
from grpo_jax.hosts.processes import Address, Limits, Word


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)


def test_a_run_of_one_process_starts_nothing():
    assert processes.find() is None
    assert processes.find("localhost:1", 1, 0) is None


def test_what_is_given_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "there:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert processes.find() == Address("there:1234", 4, 3)
    assert processes.find(process=0) == Address("there:1234", 4, 0)
    assert processes.find("here:1", 2, 1) == Address("here:1", 2, 1)


def test_slurm_is_found(monkeypatch):
    """Two tasks on each of three nodes: this is the second of the second node, with its GPU."""
    for name, value in {
        "JOB_ID": "8192",
        "STEP_NODELIST": "node[007-009]",
        "NTASKS": "6",
        "PROCID": "3",
        "LOCALID": "1",
        "STEP_NUM_NODES": "3",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes.find() == Address("node007:61440", 6, 3, (1,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("here:1", 2, None), "--coordinator here:1, --num-processes 2: .* needs --process-id too"),
        (("", None, 1), "--process-id 1: .* needs --coordinator and --num-processes too"),
        (("here", 2, 1), "--coordinator 'here' must be HOST:PORT"),
        (("here:1", 2, 2), "--process-id 2 of --num-processes 2: .* from 0 to 1"),
    ],
)
def test_an_address_that_is_not_whole_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.find(*given)


def test_a_number_in_the_environment_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES = 'two' must be a whole number"):
        processes.find("here:1", None, 0)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"process 0 cannot open port {port} .*another port"):
            processes.start(Address(f"127.0.0.1:{port}", 2, 0), Limits())
    assert processes.count() == 1


def test_one_process_meets_nobody():
    processes.barrier("anything")
    assert processes.count() == 1 and processes.is_first()
    assert processes.agree("SIGTERM") == "SIGTERM" and processes.agree("") == ""
    assert processes.gather({"a": 1.5}, "anything") == [{"a": 1.5}]
    assert processes.lost_another(ValueError("Gloo AllReduce failed")) == ""


@pytest.mark.parametrize(
    ("service_says", "told"),
    [
        (
            "DEADLINE_EXCEEDED: Barrier timed out. Id: x::3. # of tasks that reached the barrier: "
            "2/4.\nThe first task at the barrier: 1. Some timed out task names:\n2\n3\n\n\nRPC: /x",
            "process 2 and process 3 did not come to the rewards within",
        ),
        (
            "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 2 heartbeat "
            "timeout. This indicates that. Barrier Id: x::3, Task: 0",
            "process 2 died or stopped answering before the rewards",
        ),
        ("something new", "could not meet at the rewards: something new"),
    ],
)
def test_who_did_not_come_is_named(monkeypatch, service_says, told):
    """In the words that JAX 0.10.2 has for it."""
    monkeypatch.setattr(processes, "name", lambda process: f"process {process}")
    assert re.search(told, processes._explained("the rewards", service_says))


class Service:
    """What is used of JAX's service of keys."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            if key in self._values:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values)
            return self._values[key]


@pytest.mark.parametrize("given_at", [[1, None, None], [None, 9, None], [5, 5, 30]])
def test_all_hear_a_word_at_the_same_point(monkeypatch, given_at):
    """However far ahead one of them is, and whoever gives it."""
    service, told = Service(), []
    monkeypatch.setattr(processes, "_client", lambda: service)
    monkeypatch.setattr(processes, "count", lambda: 3)
    words = []
    for process in range(3):
        monkeypatch.setattr(processes, "number", lambda process=process: process)
        words.append(Word("stop", told.append))
    heard: list[int | None] = [None] * 3

    def process(number: int) -> None:
        for point in range(1, 10_000):
            if point == given_at[number]:
                words[number].give(f"SIGTERM to {number}")
            if words[number].heard():
                heard[number] = point
                return
            time.sleep(0.001 * (1 + number))

    threads = [threading.Thread(target=process, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert heard[0] is not None and len(set(heard)) == 1, heard
    assert len(told) == 3 and len(set(told)) == 1


def test_a_word_of_one_process_is_heard_at_once():
    told = []
    word = Word("stop", told.append)
    assert word.heard() == ""
    word.give("SIGTERM")
    word.give("SIGINT")
    assert word.heard() == "SIGTERM" and told == ["SIGTERM"]
