"""What environments and tools are: found by name, their schemas, what their classes can do.

All of this runs in a process of an environment, since it runs the user's code.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from grpo_jax.messages.credentials import redact
from grpo_jax.messages.values import cut
from grpo_jax.rewards import given, place, registry

CLASSES, TOOLS = "environment.classes", "environment.tools"
_NO_TOOLS = ("reset", "get_reward", "respond")  # public methods that the policy cannot call
_HOW = (
    "A tool needs type hints and a docstring that describes each argument:\n"
    'def add(a: int, b: int) -> int:\n    """Adds.\n\n    Args:\n        a: A number.\n'
    '        b: Another.\n    """'
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One environment class, or the tools alone, as an instance in a process has shown it."""

    spec: str  # the option's entry; "" of tools alone
    class_name: str  # of the class; "" of tools alone
    schemas: tuple[dict, ...]  # of the tools that the policy sees, those without a class first
    gives_reward: bool = False  # has `get_reward`
    responds: bool = False  # has `respond`
    takes: tuple[str, ...] = ()  # columns that `reset` names
    needs: tuple[str, ...] = ()  # those of them without a default
    takes_all: bool = True  # `reset` takes any column
    seconds: float = 0.0  # that its construction took


class RefusedError(Exception):
    """A fault of the user's environment or tool; its text is a message that names the option."""


def find(spec: str, option: str) -> Callable:
    """The class or function of an option's entry; RefusedError if there is none.

    The entry is "module:name", or "module:name(argument=value)" with literals as values. A class
    that has a class method `__prepare__` is told its arguments once, before any process is forked.
    """
    try:
        name, arguments = registry.split_call(spec, option)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    found = _named(name, option)
    arguments = arguments or {}
    if hasattr(found, "__prepare__"):
        try:
            found.__prepare__(**arguments)
        except ValueError as error:  # with a message of its own
            raise RefusedError(f"{option}: {spec!r}: {told(error)}") from error
        except (Exception, SystemExit) as error:
            raise RefusedError(
                f"{option}: {spec!r} cannot be prepared: {type(error).__name__}: {told(error)}."
            ) from error
    return functools.partial(found, **arguments) if arguments else found


def _named(spec: str, option: str) -> Callable:
    if spec.startswith(given.PREFIX):
        found = given.find(spec.removeprefix(given.PREFIX))
        if found is None:
            raise RefusedError(
                f"{option}: {spec!r} is an object that a Python program gave, and this one gave "
                f"{', '.join(given.names()) or 'none'}. Go on from that program, or put it into "
                "a module."
            )
        return found
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise RefusedError(
            f"{option}: {spec!r} lacks the module or the name. Write module:name, with a module "
            "that is installed, or lies in the current folder or the config file's."
        )
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way
        raise RefusedError(
            f"{option}: {spec!r} cannot be imported ({type(error).__name__}: {told(error)}"
            f"{_without_jax(error)}). The module must be installed, or lie in the current folder "
            "or the config file's."
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            close = difflib.get_close_matches(name, [n for n in dir(found) if n[0] != "_"], n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise RefusedError(
                f"{option}: {spec!r} names nothing: there is no {name!r} in it.{hint}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise RefusedError(
            f"{option}: {spec!r} is a {type(found).__name__}, which cannot be called."
        )
    return found


def _without_jax(error: BaseException) -> str:
    if isinstance(error, ImportError) and getattr(error, "name", None) in ("jax", "jaxlib"):
        return "; processes of environments are without JAX, whose threads no fork survives"
    return ""


def told(error: BaseException) -> str:
    """An error's text, without secrets and cut."""
    try:
        text = str(error)
    except Exception as second:  # user code makes the text, too
        return f"its text cannot be read: {type(second).__name__}"
    return cut(redact(text[:5000]), 500)


def construct(factory: Callable, spec: str) -> Any:
    """An instance of a class, or of what a function makes; RefusedError if it fails."""
    try:
        return factory()
    except BaseException as error:
        needed = _needed(factory)
        where = place.of_error(error, getattr(factory, "__init__", factory))
        what = (
            f"needs the arguments {', '.join(needed)}, and it is made without any. Give them "
            "defaults, or name a function that returns an instance"
            if needed
            else f"cannot be made: {type(error).__name__}: {told(error)}{where and f' ({where})'}"
        )
        raise RefusedError(f"{CLASSES}: {spec!r} {what}.") from error


def _needed(factory: Callable) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def methods(instance: Any) -> dict[str, Callable]:
    """The methods of an instance that are tools: public, and neither `reset` nor the like."""
    members = inspect.getmembers(type(instance), predicate=inspect.isfunction)
    return {
        name: getattr(instance, name)
        for name, _ in members
        if not name.startswith("_") and name not in _NO_TOOLS
    }


def tools_of(instance: Any) -> dict[str, tuple[dict | None, Callable]]:
    """The tools of an instance by name, each with its schema; None: made of hints and docstring.

    An adapter, whose tools are known only once it is made, returns them from `__tools__`.
    """
    if hasattr(type(instance), "__tools__"):
        return {schema["function"]["name"]: (schema, f) for schema, f in instance.__tools__()}
    return {name: (None, method) for name, method in methods(instance).items()}


def schema(function: Callable, where: str) -> dict:
    """The schema of a tool as transformers makes it; RefusedError if it lacks what that needs."""
    from transformers.utils import chat_template_utils

    # It would import torch, in seconds and megabytes, to know a type that no tool here has.
    chat_template_utils.is_torch_available = lambda: False
    try:
        made = chat_template_utils.get_json_schema(function)
    except Exception as error:
        at = place.of_function(function)
        raise RefusedError(
            f"{where}: {told(error).rstrip('.')}{at and f' ({at})'}. {_HOW}"
        ) from error
    return {"type": "function", "function": made.get("function", made)}


def kind_of_tools(tools: dict[str, Callable], specs: dict[str, str]) -> Kind:
    """The kind of episodes that have tools alone."""
    return Kind("", "", tuple(schema(f, f"{TOOLS}: {specs[n]!r}") for n, f in tools.items()))


def kind_of(instance: Any, spec: str, alone: Kind, seconds: float) -> Kind:
    """The kind of an instance; RefusedError if it has no `reset` or a tool lacks hints.

    `alone`: the tools that every environment has.
    """
    has = lambda name: callable(getattr(type(instance), name, None))  # noqa: E731
    if not has("reset"):
        raise RefusedError(
            f"{CLASSES}: {spec!r} makes a {type(instance).__name__} without a method `reset`, "
            "which begins each episode: def reset(self, **row) -> str | None."
        )
    own = [
        made or schema(method, f"{CLASSES}: {spec!r}, method {name}")
        for name, (made, method) in tools_of(instance).items()
    ]
    names = [s["function"]["name"] for s in (*alone.schemas, *own)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RefusedError(
            f"{CLASSES}: {spec!r} and {TOOLS} both have a tool {twice[0]!r}. Rename one."
        )
    responds = has("respond") or has("__turn__")
    if not own and not alone.schemas and not responds:
        raise RefusedError(
            f"{CLASSES}: {spec!r} has no public method that could be a tool, and no `respond`: "
            "an episode would be one turn."
        )
    parameters = list(inspect.signature(instance.reset).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Kind(
        spec,
        type(instance).__name__,
        (*alone.schemas, *own),
        has("get_reward"),
        responds,
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
        seconds,
    )
