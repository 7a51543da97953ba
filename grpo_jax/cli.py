"""Shared by the programs: settings of JAX and its devices, and the handling of errors."""

from __future__ import annotations

import collections
import contextlib
import dis
import gc
import importlib
import os
import shutil
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from grpo_jax.config import arguments, derived, loading
from grpo_jax.hosts import cpus, processes
from grpo_jax.hosts.processes import Limits
from grpo_jax.messages import console as console_lib
from grpo_jax.messages import events
from grpo_jax.messages.console import console, in_words, one_line, say
from grpo_jax.messages.credentials import redact
from grpo_jax.run import disk, stop
from grpo_jax.run.stop import StopSignal


def join_processes(config: ConfigDict, found: arguments.Processes) -> None:
    """Returns when all processes of the run have started. Call it before anything uses JAX."""
    address = processes.find(found.coordinator, found.num_processes, found.process_id)
    if address is None or jax.distributed.is_initialized():
        return
    # A process that waits for another in a barrier is not the one that stalls.
    meeting_s = 1.1 * config.loop.stall_timeout_s + 60 if config.loop.stall_timeout_s else 1e6
    limits = Limits(config.hosts.start_timeout_s, config.hosts.heartbeat_timeout_s, meeting_s)
    processes.start(address, limits)
    console.quiet = not processes.is_first()  # all would print the same


_SMALL = 50_000_000  # parameters; a larger model's products are worth several threads


def use_all_cores(config: ConfigDict, num_params: int) -> None:
    """Makes each CPU core a JAX device, for a small model with the default mesh.

    Skipped for runs of several processes, and if XLA_FLAGS sets the number of devices.

    Two devices with their own work are faster than one device with two threads, which wait for each
    other after every product; but each device holds the model. The number of devices divides the
    groups of an update. No effect on accelerators. Call it before anything uses JAX.
    """
    mesh = config.mesh
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    asked = asked or mesh.data != -1 or mesh.fsdp * mesh.sequence * mesh.tensor != 1
    if asked or num_params > _SMALL or processes.count() > 1:
        return
    groups = derived.groups_at_once(config)
    devices = max(n for n in range(1, cpus.usable() + 1) if groups % n == 0)
    if jax.config.jax_num_cpu_devices != devices:
        with contextlib.suppress(RuntimeError):  # the program has used JAX before
            jax.config.update("jax_num_cpu_devices", devices)


def use_compile_cache(mesh: ConfigDict | None = None, *, traced: bool = False) -> None:
    """Keeps compiled programs in the user's cache folder for later runs.

    JAX's own environment variables may set another folder, such as a bucket that all hosts share,
    and the least compile time of a kept program.

    On a CPU there are two exceptions. A run that is to be `traced` does not use the cache: in the
    trace of a cached program, operations have lost their part of the network. Nor does a run whose
    `mesh` splits the network over several devices: in such a cached program, devices may reach
    collectives in different orders and deadlock (jaxlib 0.10.2).
    """
    split = mesh is not None and (mesh.fsdp, mesh.sequence, mesh.tensor) != (1, 1, 1)
    split = split and len(jax.devices()) > 1
    if (traced or split) and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in containers
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_enable_compilation_cache", False)
            return
        base = ""  # not read
    for variable, value in (
        ("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "grpo_jax" / "compiled")),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.5),
    ):
        if not os.environ.get(variable):
            jax.config.update(variable.lower(), value)


# JAX settings that environment variables could change, and that change results.
_SETTINGS = {
    "jax_enable_x64": False,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_default_prng_impl": "threefry2x32",
    "jax_numpy_dtype_promotion": "standard",
    "jax_softmax_custom_jvp": False,
    "jax_disable_jit": False,
}


def hold_settings() -> None:
    """Sets the JAX settings that change results, whatever the environment variables say."""
    for name, value in _SETTINGS.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


@contextlib.contextmanager
def held_settings() -> Iterator[None]:
    """`hold_settings` while entered; restores the caller's settings afterwards."""
    before = {name: jax.config.values[name] for name in _SETTINGS}
    hold_settings()
    try:
        yield
    finally:
        for name, value in before.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)


def show_devices(show: Callable[[str], None] = say) -> None:
    """Prints the devices in use. Raises ValueError if JAX cannot provide them."""
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a message
        why = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise ValueError(
            f"JAX finds no device of JAX_PLATFORMS = {os.environ.get('JAX_PLATFORMS', '')!r}{why}. "
            "Install what such devices need, as pip install 'jax[cuda13]', 'jax[cuda12]' or "
            "'jax[tpu]', or unset that variable to run on what is there."
        ) from error
    kinds = collections.Counter(device.device_kind for device in devices)
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    platform = devices[0].platform
    show(f"Runs on {named}." if {*kinds} == {platform} else f"Runs on {named} ({platform}).")


def use_nan_checks(check: bool) -> None:
    """With `check`, JAX stops at the operation that produced the first NaN.

    Infinities are allowed: a sampler sets the logits of excluded tokens to -inf.
    """
    jax.config.update("jax_debug_nans", check)


@contextlib.contextmanager
def told(config: ConfigDict, folder: Path) -> Iterator[None]:
    """While entered, a run prints by `logging.console` and reports events to `logging.on_event`.

    It reports the end of a run that stops or fails; the caller, which has the summary, reports a
    finished run. Only the first process reports.
    """
    console_lib.show_as(config.logging.console)
    if not processes.is_first():
        yield
        return

    def ended(message: str, status: int) -> None:
        events.happened("stopped" if status == stop.STATUS else "failed", message)
        events.wait()

    with events.told_to(config.logging.on_event, folder), processes.before_abort(ended):
        try:
            yield
        except stop.Stopped as stopped:
            events.happened("stopped", str(stopped))
            raise
        except BaseException as error:
            kind = type(error).__name__
            text = str(error) if isinstance(error, ValueError) else f"{kind}: {error}"
            events.happened("failed", one_line(text))
            raise


def train_on_given(
    argv: list[str],
    name: str,
    section: str,
    run: Callable[[ConfigDict, Path, StopSignal], Path],
    check: Callable[[ConfigDict, Path], None],
    head: str | None = None,
) -> None:
    """A program that trains on completions of the data: `name` is its own, one of `RUNS`.

    `section` of the config has its schedule; `head` as in `model.model_shape`. `run` trains, and
    returns the exported folder; `check` says what it would do.
    """
    from grpo_jax.setup import model  # imports what some programs do without

    config, folder, others, is_check = arguments.of_run(argv, name)
    join_processes(config, others)
    if not derived.is_supervised(config, section):
        raise ValueError(
            f"{section}.num_steps = 0: nothing to train. Set it or {section}.num_epochs above 0."
        )
    set_up(config, model.model_shape(config, folder, head).num_params)
    if is_check:
        return check(config, folder)
    save_before_s = config.checkpoint.save_before_s
    with told(config, folder), StopSignal(save_before_s, may_exit=True) as stop_signal:
        export = run(config, folder, stop_signal)
        events.happened("finished", f"Run finished: {folder}", export=str(export))
        say(f"The trained model is in {export}.", always=True)


def set_up(config: ConfigDict, num_params: int) -> None:
    """Sets JAX's devices and settings by the config, for training on completions of the data."""
    use_all_cores(config, num_params)
    show_devices()
    use_nan_checks(config.debug.nans)
    if config.compile_cache:
        use_compile_cache(config.mesh)


def make_callable(module: str, function: str) -> None:
    """Lets the module of a program be called: `grpo_jax.sft(...)` trains from Python.

    `function`: what is called, "module:function"; it is imported then, and has the documentation.
    """

    class Program(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            place, _, name = function.partition(":")
            return getattr(importlib.import_module(place), name)(*args, **kwargs)

    sys.modules[module].__class__ = Program


_LINGER_S = 5.0  # for threads to end


def main(run: Callable[[list[str]], None]) -> None:
    """Runs a program; a user's mistake ends it with one message and status 1, or 2 for its usage.

    For an error that may not be the user's, the message says how to see the traceback.

    A program that has saved after a requested stop ends with status 75, which tells a launcher that
    there is more to do. With several processes, the end of one ends all.
    """
    before = set(threading.enumerate())
    # Tracing makes many objects, and each search for garbage would read all that is imported.
    gc.freeze()
    hold_settings()
    try:
        status = 0
        try:
            run(sys.argv[1:])
        except stop.Stopped as stopped:
            say(str(stopped), always=True)
            status = stop.STATUS
        processes.shutdown()
        _let_go(status, before)
        if status:
            sys.exit(status)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception as error:
        message = processes.lost_another(error) or (
            str(error) if isinstance(error, ValueError) else ""
        )
        if disk.is_full(error) and not message:
            message = f"the disk is full ({error}). Make space; the same command continues a run."
        if os.environ.get("GRPO_JAX_TRACEBACK") or not message:
            if processes.count() == 1:
                sys.excepthook = _show_traceback
                raise
            _show_traceback(type(error), error, error.__traceback__)
            _end(one_line(message or f"{type(error).__name__}: {error}"), 1)
        message = one_line(message)
        with contextlib.suppress(OSError):  # nobody listens
            text = f"error: {message}"
            if sys.stderr.isatty():
                text = in_words(text, shutil.get_terminal_size().columns)
            print(text, file=sys.stderr)
            if not _is_mistake(error):
                print("(GRPO_JAX_TRACEBACK=1 shows where it was raised.)", file=sys.stderr)
        status = 2 if isinstance(error, loading.Usage) else 1
        _let_go(status, before)
        _end(message, status)


def _is_mistake(error: Exception) -> bool:
    """Whether it is a ValueError raised by this package, with a message for the user.

    A library's ValueError is not, such as NumPy's for shapes that do not fit.
    """
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    is_raise = trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    ours = module.partition(".")[0] in ("grpo_jax", "__main__")
    return isinstance(error, ValueError) and is_raise and ours


def _show_traceback(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redact(text), end="", file=sys.stderr)


def _let_go(status: int, before: set[threading.Thread]) -> None:
    """Ends the process if threads keep it alive, as Orbax's do for minutes after a failed save.

    `before`: the threads that existed before the program.
    """
    with contextlib.suppress(AttributeError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:  # the interpreter would retry, and end with another status
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    until = time.monotonic() + _LINGER_S
    left = [t for t in threading.enumerate() if t not in before and not t.daemon]
    for thread in left:
        thread.join(max(until - time.monotonic(), 0.0))
    if any(thread.is_alive() for thread in left):
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        if processes.count() == 1:
            os._exit(status)


def _end(message: str, status: int) -> NoReturn:
    if processes.count() > 1:
        processes.abort(message, status)
    sys.exit(status)
