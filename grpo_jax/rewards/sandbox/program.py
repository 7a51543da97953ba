"""What happens inside of a program's process, after it was shut in.

The file descriptors are 0 stdin, 1 stdout, 3 the code, 4 a channel to the caller, 5 one to
another program. Expected results
are never here: the caller compares.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.rewards.sandbox import plain, remote, testing

CODE, CHANNEL, PEER = 3, 4, 5
_MAX_TOLD = 300  # characters of an error


def run(kind: str) -> int:
    """Runs the program as `kind` says; returns the exit status."""
    return KINDS[kind](_text(CODE))


def _text(file: int) -> str:
    with os.fdopen(file, "rb") as opened:
        opened.seek(0)
        return opened.read().decode("utf-8", "replace")


def lines(channel: int) -> tuple[Iterator[bytes], Callable[[Any], None]]:
    """What comes through a channel, line by line; and a function that sends a value as JSON."""
    reader = os.fdopen(os.dup(channel), "rb")

    def send(value: Any) -> None:
        data = json.dumps(value).encode() + b"\n"
        while data:
            data = data[os.write(channel, data) :]

    return reader, send


def told(error: BaseException) -> str:
    """An error in a line."""
    try:
        return f"{type(error).__name__}: {error}"[:_MAX_TOLD]
    except Exception:
        return type(error).__name__


def executed(text: str, name: str) -> dict[str, Any]:
    """The names of a module `name` after its code has run."""
    module = types.ModuleType(name)
    module.__dict__["__file__"] = "solution.py"
    sys.modules[name] = module
    sys.argv = ["solution.py"]
    exec(compile(text, "solution.py", "exec"), module.__dict__)
    return module.__dict__


# --- Kinds of programs ----------------------------------------------------------------------------


def _script(text: str) -> int:
    """A whole program: it reads stdin and prints; the channel tells its error, if any."""
    status = 0
    try:
        executed(text, "__main__")
    except SystemExit as error:
        status = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
        if status:
            _tell(error)
    except BaseException as error:
        _tell(error)
        status = 1
    try:
        threading._shutdown()  # waits for the program's threads, as Python does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        pass
    return status & 255


def _tell(error: BaseException) -> None:
    try:
        os.write(CHANNEL, told(error).encode("utf-8", "replace"))
    except OSError:  # the program has closed it
        pass


def _calls(text: str) -> int:
    """A function that is called once for each line of the channel: {"name", "args", "kwargs"}."""
    reader, send = lines(CHANNEL)
    try:
        names = executed(text, "solution")
    except BaseException as error:
        send({"error": told(error)})
        return 0
    send({})
    for line in reader:
        asked = json.loads(line)
        try:
            function = find(names, asked["name"])
            args, kwargs = plain.unpacked(asked["args"]), plain.unpacked(asked["kwargs"])
            answer = {"value": plain.packed(function(*args, **kwargs))}
        except BaseException as error:
            answer = {"error": told(error)}
        send(answer)
    return 0


def find(names: dict[str, Any], name: str) -> Callable:
    """The function of that name, or a method of the class `Solution`; a new object each time."""
    if name in names:
        return names[name]
    if "Solution" in names:
        return getattr(names["Solution"](), name)
    raise NameError(f"the program defines no {name}")


def _served(text: str) -> int:
    """A module whose names another process calls; see `remote.py`."""
    reader, send = lines(PEER)
    return remote.serve(lambda: executed(text, "solution"), reader, send, told)


def _tests(text: str) -> int:
    """Tests of a module that another process serves; see `testing.py`."""
    reader, send = lines(PEER)
    _, report = lines(CHANNEL)
    return testing.run(text, reader, send, report, told)


KINDS: dict[str, Callable[[str], int]] = {
    "script": _script,
    "calls": _calls,
    "served": _served,
    "tests": _tests,
}
