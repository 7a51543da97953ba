"""Reward functions that a program gives as objects, not by name: from a script or a notebook.

Such a function has the name "python:NAME" in `rewards.names`. The processes of rewards cannot
import it, so they get it by value: its code, and the values that the code names.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable

PREFIX = "python:"
_FUNCTIONS: dict[str, Callable] = {}  # of this process, by name


def give(function: Callable) -> str:
    """The spec, for `rewards.names`, of a function; its workers import it or get it by value.

    Raises ValueError where it is not callable, or cannot be sent.
    """
    if not callable(function):
        raise ValueError(
            f"rewards holds {function!r}, a {type(function).__name__}. Give functions, names of "
            'built-in rewards or "module:function"; or pairs of one of these and a weight.'
        )
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module != "__main__" and getattr(sys.modules.get(module), path, None) is function:
        return f"{module}:{path}"
    name = _name(function)
    _FUNCTIONS[name] = function
    try:
        pickled([PREFIX + name])
    except ValueError:
        del _FUNCTIONS[name]
        raise
    return PREFIX + name


def _name(function: Callable) -> str:
    """As metrics show it: a function's own name, or its class's; a lambda is called `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "function" if name == "<lambda>" else re.sub(r"\W", "_", name)


def find(name: str) -> Callable | None:
    """The function that was given under a name, "python:" left out; None where none was."""
    return _FUNCTIONS.get(name)


def names() -> list[str]:
    """Of all that were given to this process."""
    return sorted(_FUNCTIONS)


def pickled(specs: Iterable[str]) -> dict[str, bytes]:
    """By name, the bytes of those functions of `specs` that were given."""
    found = {}
    for spec in specs:
        name = spec.partition("(")[0].strip().removeprefix(PREFIX)
        if spec.startswith(PREFIX) and name in _FUNCTIONS:
            import dill  # takes long to import, and only this needs it

            try:
                found[name] = dill.dumps(_FUNCTIONS[name], recurse=True)
            except Exception as error:  # of any object that a function holds
                raise ValueError(
                    f"rewards: the function {name!r} cannot be sent to the processes of rewards "
                    f"({type(error).__name__}: {error}). What it needs of that kind, let it make "
                    "itself at its first call; or put it into a module that can be imported."
                ) from error
    return found


def receive(functions: dict[str, bytes]) -> None:
    """In a process of rewards: takes what `pickled` gave."""
    for name, data in functions.items():
        import dill

        _FUNCTIONS[name] = dill.loads(data)


def source(spec: str) -> bytes:
    """The text of a given function, or of its class; b"" where it has none."""
    found = find(spec.partition("(")[0].strip().removeprefix(PREFIX))
    while isinstance(found, functools.partial):
        found = found.func
    try:
        text = inspect.getsource(found if inspect.isroutine(found) else type(found))
    except (OSError, TypeError):
        return b""
    return text.encode()
