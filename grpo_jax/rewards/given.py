"""Reward functions that a program gives as objects, not by name: from a script or a notebook.

Such a function has the name "python:NAME" in `rewards.names`. Reward workers cannot import it, so
they get it pickled by value: its code, and the values that the code refers to.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable

PREFIX = "python:"
_FUNCTIONS: dict[str, Callable] = {}  # given to this process, by name


def give(function: Callable, of: str = "rewards") -> str:
    """The entry of `rewards.names` for a function; workers import it or get it by value.

    `of`: the argument that it was given as, for messages: also tools and environments have such
    entries. Raises ValueError if it is not callable, or cannot be pickled.
    """
    if not callable(function):
        raise ValueError(
            f"{of} holds {function!r}, a {type(function).__name__}. Give functions, names of "
            'built-in rewards or "module:function"; or pairs of one of these and a weight.'
            if of == "rewards"
            else f"{of} holds {function!r}, a {type(function).__name__}. Give functions, classes "
            'or names, "module:name".'
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
    """The name in metrics: a function's own, or its class's; a lambda is called `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "function" if name == "<lambda>" else re.sub(r"\W", "_", name)


def find(name: str) -> Callable | None:
    """The given function of a name, without "python:"; None if there is none."""
    return _FUNCTIONS.get(name)


def names() -> list[str]:
    """The names of all functions given to this process."""
    return sorted(_FUNCTIONS)


def pickled(specs: Iterable[str]) -> dict[str, bytes]:
    """Pickled bytes by name, for those of `specs` that are given functions."""
    found = {}
    for spec in specs:
        name = spec.partition("(")[0].strip().removeprefix(PREFIX)
        if spec.startswith(PREFIX) and name in _FUNCTIONS:
            import dill  # slow to import, and needed only here

            try:
                found[name] = dill.dumps(_FUNCTIONS[name], recurse=True)
            except Exception as error:  # any error, from any object that a function holds
                raise ValueError(
                    f"rewards: the function {name!r} cannot be sent to the reward workers "
                    f"({type(error).__name__}: {error}). Let it make that object itself at its "
                    "first call, or put it into a module that can be imported."
                ) from error
    return found


def receive(functions: dict[str, bytes]) -> None:
    """Called in a worker: unpickles the result of `pickled`."""
    for name, data in functions.items():
        import dill

        _FUNCTIONS[name] = dill.loads(data)


def source(spec: str) -> bytes:
    """The source text of a given function, or of its class; b"" if it has none."""
    found = find(spec.partition("(")[0].strip().removeprefix(PREFIX))
    while isinstance(found, functools.partial):
        found = found.func
    try:
        text = inspect.getsource(found if inspect.isroutine(found) else type(found))
    except (OSError, TypeError):
        return b""
    return text.encode()
