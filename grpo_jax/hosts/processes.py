"""The processes of a run: how they find each other, wait for each other, and end together.

On several hosts a run is one process on each, and all of them do the same things in the same order.
A run of one process starts nothing, and everything here returns at once. The processes communicate
through the service that JAX runs on process 0. Its public functions cannot wait with a time limit,
nor say which process is missing. So this file alone uses private functions of JAX (0.10.2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

_SPACE = "grpo_jax"  # prefix of our keys and barriers; JAX and Orbax have their own
_PORT = re.compile(r"(.+):(\d+)")


class Lost(ValueError):  # noqa: N818
    """Another process died, or did not reach a barrier in time."""


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of the run's coordinator, and the number of this process."""

    coordinator: str  # HOST:PORT, on the host of process 0
    num_processes: int
    process: int
    local_devices: tuple[int, ...] | None = None  # devices of the host that it uses; None: all


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long this process waits for the others."""

    start_s: float = 300.0  # for all to start
    lost_s: float = 100.0  # for a heartbeat
    meeting_s: float = 3600.0  # for all to reach a barrier


_limits = Limits()
_listener: threading.Thread | None = None
_witness: subprocess.Popen | None = None
_num_asked = 0  # calls of `agree` so far; numbers its keys


def find(
    coordinator: str = "", num_processes: int | None = None, process: int | None = None
) -> Address | None:
    """The address of this process in the run; None if the run has only one process.

    Missing arguments are taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    then from the cluster if JAX knows it: TPU pods, GKE, SLURM, Open MPI. Raises ValueError if some
    of them remain unknown.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    num_processes = _from_environment("JAX_NUM_PROCESSES", num_processes)
    process = _from_environment("JAX_PROCESS_ID", process)
    local_devices = None
    if not coordinator or None in (num_processes, process):
        coordinator, num_processes, process, local_devices = _detect(
            coordinator, num_processes, process
        )
    known = {
        "--coordinator": coordinator or None,
        "--num-processes": num_processes,
        "--process-id": process,
    }
    missing = [name for name, value in known.items() if value is None]
    if len(missing) == len(known) or (num_processes == 1 and not process):
        return None
    if missing:
        given = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
        raise ValueError(
            f"{given}: a run of several processes needs {' and '.join(missing)} too. Give each "
            "process all three, or start them by TPU, GKE, SLURM or Open MPI, where JAX finds "
            "them."
        )
    if not _PORT.fullmatch(coordinator):
        raise ValueError(f"--coordinator {coordinator!r} must be HOST:PORT, on process 0's host.")
    if not 0 <= process < num_processes:
        raise ValueError(
            f"--process-id {process} of --num-processes {num_processes}: processes are numbered "
            f"from 0 to {num_processes - 1}."
        )
    return Address(coordinator, num_processes, process, local_devices)


def _from_environment(name: str, value: int | None) -> int | None:
    text = os.environ.get(name)
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ValueError(f"The environment variable {name} = {text!r} must be a whole number.")
    return int(text)


def _detect(coordinator: str, num_processes: int | None, process: int | None):
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator or None, num_processes, process, None, None, 60
        )
    except Exception as error:  # a cluster's description may be broken in any way
        raise ValueError(
            f"The cluster's description of this run's processes cannot be read ({error}). Give "
            "each process --coordinator, --num-processes and --process-id."
        ) from error
    coordinator, num_processes, process, devices = found
    return coordinator or "", num_processes, process, None if devices is None else tuple(devices)


# --- Start and end --------------------------------------------------------------------------------


def start(address: Address, limits: Limits) -> None:
    """Waits until all processes have started. Call it before anything uses a device.

    Ends the process with a message if they have not started within `limits.start_s`. Raises
    ValueError if the port of process 0 is taken.
    """
    global _limits, _listener
    _limits = limits
    if address.process == 0:
        _refuse_taken(int(address.coordinator.rpartition(":")[2]))
    # JAX's handler would swallow SIGTERM, on which the run must save.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(
        limits.start_s,
        _exit,
        [
            f"process {address.process}: not all of the {address.num_processes} processes came to "
            f"{address.coordinator} within hosts.start_timeout_s = {limits.start_s:g} s. See which "
            "one is missing, and whether that address belongs to process 0 and can be reached."
        ],
    )
    late.daemon = True
    late.start()
    jax.distributed.initialize(
        address.coordinator,
        address.num_processes,
        address.process,
        local_device_ids=address.local_devices,
        initialization_timeout=int(limits.start_s) + 60,  # JAX would abort without a message
        heartbeat_timeout_seconds=int(1.5 * limits.lost_s) + 5,  # the witness acts earlier
    )
    late.cancel()
    _client().key_value_set(f"{_SPACE}/host/{address.process}", socket.gethostname())
    _listener = threading.Thread(target=_listen, name="hosts", daemon=True)
    _listener.start()
    _start_witness(address, limits)


def _start_witness(address: Address, limits: Limits) -> None:
    """Starts this process's witness (`loss_monitor.py`) and the thread of its heartbeats."""
    global _witness
    hub, token, key = None, secrets.token_hex(16), f"{_SPACE}/witness"
    if address.process:
        answer = _client().blocking_key_value_get(key, int(limits.start_s * 1000))
        port, token = json.loads(answer)
        hub = [address.coordinator.rpartition(":")[0].strip("[]"), port]
    _witness = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("loss_monitor.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    setting = {
        "hub": hub,
        "process": address.process,
        "name": name(address.process),
        "parent": os.getpid(),
        "lost_s": limits.lost_s,
        "token": token,
    }
    _tell_witness(json.dumps(setting))
    if hub is None:
        port = int(_witness.stdout.readline())
        _client().key_value_set(key, json.dumps([port, token]))

    def live() -> None:
        while _tell_witness("alive"):
            time.sleep(min(1.0, limits.lost_s / 4))

    threading.Thread(target=live, name="heartbeat", daemon=True).start()


def _tell_witness(line: str) -> bool:
    """Sends a line to the witness; returns whether one is running."""
    try:
        _witness.stdin.write(line.encode() + b"\n")
        _witness.stdin.flush()
    except (OSError, ValueError, AttributeError):  # it has ended, or was never started
        return False
    return True


def _refuse_taken(port: int) -> None:
    try:  # JAX would crash on it
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator: process 0 cannot open port {port} of its host ({error.strerror}). "
            "Give all processes the address of another port."
        ) from error


def count() -> int:
    """How many processes the run has; unlike `jax.process_count`, it uses no device."""
    return 1 if _client() is None else distributed.global_state.num_processes


def number() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id


def is_first() -> bool:
    """Whether this is process 0, which writes the files that all share."""
    return number() == 0


def name(process: int) -> str:
    """A process as messages name it: its number and its host."""
    try:
        return f"process {process} ({_client().key_value_try_get(f'{_SPACE}/host/{process}')})"
    except jax.errors.JaxRuntimeError:  # it never started
        return f"process {process}"


def lost_another(error: Exception) -> str:
    """The message for an error that another process's end has caused; "" for other errors."""
    if isinstance(error, Lost):
        return str(error)
    broken = re.search(r"Gloo|NCCL|UNAVAILABLE|Connection (closed|reset)", str(error))
    if count() == 1 or not broken:
        return ""
    return (
        f"{name(number())} lost another process, which died or was stopped; its log, or the "
        f"program that started it, says why. ({str(error).splitlines()[0]})"
    )


def shutdown() -> None:
    """Waits until all processes are done, then leaves JAX's service."""
    if count() > 1:
        barrier("the end of the run")
        _tell_witness("bye")
        jax.distributed.shutdown()
        # A thread still inside JAX at the interpreter's end would abort the process.
        _listener.join(timeout=10)


def abort(message: str, status: int = 1) -> NoReturn:
    """Ends this process at once, and all others with the same status; each prints the message.

    An exception does not suffice: JAX would wait for the others to end, and they for this process.
    """
    _tell_witness("bye")
    if count() > 1:
        own = number()
        told = json.dumps([own, status, f"{name(own)} ended: {message}"])
        try:
            _client().key_value_set(f"{_SPACE}/fault", told)
        except jax.errors.JaxRuntimeError:  # another was first, or process 0 is gone
            pass
        if own == 0:
            time.sleep(1.0)  # the service ends with this process: let the others read it first
    _on_abort(message, status)
    with contextlib.suppress(OSError):  # a log on a full disk, a pipe that nobody reads
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _on_abort(message: str, status: int) -> None: ...


@contextlib.contextmanager
def before_abort(tell: Callable[[str, int], None]) -> Iterator[None]:
    """While entered, a sudden end of the process first calls `tell(message, status)`."""
    global _on_abort
    before, _on_abort = _on_abort, tell
    try:
        yield
    finally:
        _on_abort = before


def _listen() -> None:
    """Ends this process when another one has called `abort`."""
    try:
        told = _waited_for(f"{_SPACE}/fault")
    except (jax.errors.JaxRuntimeError, AttributeError):
        return  # the service is gone, and JAX ends the process; or the run is over
    process, status, message = json.loads(told)
    if process != number():
        _exit(f"process {number()} ends, because {message}", status)


def _exit(message: str, status: int = 1) -> NoReturn:
    _tell_witness("bye")
    print(f"error: {message}", file=sys.stderr, flush=True)
    _on_abort(message, status)
    os._exit(status)


# --- Meeting --------------------------------------------------------------------------------------


def barrier(what: str) -> None:
    """Waits until all processes are here; raises `Lost` if one does not come.

    `what` names it in errors. All must call this and its callers equally often, in the same order.
    """
    if count() == 1:
        return
    try:
        _client().wait_at_barrier(f"{_SPACE}/meeting", int(_limits.meeting_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise Lost(_explained(what, str(error))) from error


def _explained(what: str, error: str) -> str:
    """The message that names the missing processes, read from the service's error text."""
    dead = re.search(r"[Tt]ask:? (\d+)", error.partition("Barrier failed because")[2])
    if dead:
        return f"{name(int(dead[1]))} died or stopped answering before {what}; its log says why."
    late = re.search(r"timed out task names:\s*([\d\s]+)", error)
    if late:
        names = " and ".join(name(int(number)) for number in late[1].split())
        return (
            f"{names} did not come to {what} within loop.stall_timeout_s = {_limits.meeting_s:g} "
            "s. A stalled reward, file system or host may be the reason; its log says where it is."
        )
    return f"The processes could not meet at {what}: {error}"


def agree(text: str) -> str:
    """The text of the lowest-numbered process that gives one, on every process; "" if all give "".

    No device takes part, so the devices go on working.
    """
    global _num_asked
    if count() == 1:
        return text
    _num_asked += 1
    answers = f"{_SPACE}/answer/{_num_asked:09}"
    if text:  # before the barrier, so that all find it after
        _client().key_value_set(f"{answers}/{number():06}", text)
    barrier(f"check {_num_asked} for a stop")
    said = _client().key_value_dir_get(answers)
    return min(said)[1] if said else ""


class Word:
    """A text that any process may give; all processes receive it at the same call of `heard`.

    Until it is given, a call of `heard` costs nothing. Then each process publishes how often it has
    called `heard`, and all receive the text at the call after the largest of these counts.
    """

    def __init__(self, name: str, on_given: Callable[[str], None]):
        """`on_given(text)` is called on every process, in a thread, as soon as it arrives."""
        self._name, self._number, self._on_given = f"{_SPACE}/{name}", number(), on_given
        self._num_asked, self._text, self._heard_at = 0, "", 0
        self._lock, self._agreed = threading.Lock(), threading.Event()
        if count() > 1:
            threading.Thread(target=self._listen, name=name, daemon=True).start()

    def give(self, text: str) -> None:
        """Gives the text; if several are given, the first counts."""
        if count() == 1:
            self._take(text)
            self._agreed.set()
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            _client().key_value_set(self._name, text)

    def heard(self) -> str:
        """The text, once all receive it; "" before. All must call this equally often."""
        with self._lock:
            self._num_asked += 1
            if not self._text:
                return ""
        self._agreed.wait()  # the others' threads publish their counts
        return self._text if self._num_asked >= self._heard_at else ""

    def _take(self, text: str) -> int:
        with self._lock:
            first = not self._text
            self._text = self._text or text
            num_asked = self._num_asked
        if first:
            self._on_given(text)
        return num_asked

    def _listen(self) -> None:
        try:
            own = self._take(_waited_for(self._name))
            _client().key_value_set(f"{self._name}/{self._number}", str(own))
            asked = [int(_waited_for(f"{self._name}/{p}")) for p in range(count())]
        except (jax.errors.JaxRuntimeError, AttributeError):  # the run is over
            return
        self._heard_at = max(asked) + 1
        self._agreed.set()


def _waited_for(key: str) -> str:
    """The value of a key; waits until some process has set it."""
    while True:
        try:
            return _client().blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def gather(value: Any, what: str) -> list[Any]:
    """The values of all processes, in order, on every process; JSON, and NaN is allowed."""
    if count() == 1:
        return [value]
    barrier(what)
    own_B = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size_H = multihost_utils.process_allgather(np.int32(len(own_B)))
    # Padded to a power of two, so that few sizes are compiled.
    padded_B = np.zeros(1 << int(size_H.max() - 1).bit_length(), np.uint8)
    padded_B[: len(own_B)] = own_B
    all_HB = multihost_utils.process_allgather(padded_B)
    return [json.loads(bytes(row_B[:size])) for row_B, size in zip(all_HB, size_H)]


def _client() -> Any:
    return distributed.global_state.client
