"""What a program is tested with: read from the formats that data sets have.

A value is read by its shape, so one column `tests` holds any of them (docs/code_rewards.md).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

_PYTHON = ("python", "python3", "py", "", None)


@dataclasses.dataclass(frozen=True)
class Script:
    """A whole program's input, and what it must print."""

    stdin: str
    stdout: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A function's arguments, and what it must return; any of `results` is right."""

    name: str
    args: list
    kwargs: dict
    results: tuple


@dataclasses.dataclass(frozen=True)
class Checks:
    """Code that tests the program: a pytest file, assert statements, or a function `check`."""

    style: str  # "pytest", "asserts" or "check"
    parts: tuple[str, ...]
    setup: str = ""
    entry: str = ""  # what `check` is called with


Cases = Sequence[Script] | Sequence[Call] | Checks


def read(value: Any, setup: str = "", entry: str = "") -> Cases:
    """The cases of a row's `tests`; ValueError, saying what is wrong, for what is none.

    `setup`: code that runs before asserts. `entry`: the name of the function that is tested.
    """
    if isinstance(value, str):
        try:
            held = json.loads(value)
        except (ValueError, RecursionError):
            return _tests_of(value, setup, entry)
        if not isinstance(held, (dict, list)):
            return _tests_of(value, setup, entry)
        value = held
    if isinstance(value, Mapping):
        return _of_mapping(value, setup, entry)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return _of_list(list(value), setup, entry)
    raise ValueError("holds neither text nor cases")


def fault_of(value: Any) -> str | None:
    """What is wrong with a row's `tests`, or None."""
    try:
        read(value, entry="entry_point")  # a further column, which is not looked at here
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return f"cannot be read as tests ({error})"
    return None


def _of_mapping(value: Mapping, setup: str, entry: str) -> Cases:
    has = {name: x for name, x in value.items() if x is not None}
    if has.get("language") not in _PYTHON:
        raise ValueError(f"are for {has['language']!r}; only Python is run")
    if "test_cases" in has:
        return read(has["test_cases"], setup, has.get("fn_name", entry))
    if "inputs" in has and "outputs" in has:
        inputs, outputs = list(has["inputs"]), list(has["outputs"])
        if len(inputs) != len(outputs):
            raise ValueError(f"have {len(inputs)} inputs and {len(outputs)} outputs")
        return _some([_case(i, o, has.get("fn_name", "")) for i, o in zip(inputs, outputs)])
    if "assert_case" in has:
        return _of_list(list(has["assert_case"]), setup, entry)
    if "test_code" in has:
        before = has.get("import_prefix", setup)
        return _tests_of(has["test_code"], before, has.get("entry_point", entry))
    return _of_list([value], setup, entry)


def _of_list(values: list, setup: str, entry: str) -> Cases:
    if values and all(isinstance(x, str) for x in values):
        for text in (setup, *values):
            _parsed(text)
        return Checks("asserts", tuple(values), setup)
    found = []
    for number, x in enumerate(values):
        if not isinstance(x, Mapping):
            raise ValueError(f"have a {type(x).__name__} as case {number}")
        found.append(_of_row({n: v for n, v in x.items() if v is not None}, number, entry))
    if len({type(x) for x in found}) > 1:
        raise ValueError("have cases of whole programs and of functions; a row needs one kind")
    return _some(found)


def _of_row(has: dict, number: int, entry: str) -> Script | Call:
    if "call" in has:
        if "result" not in has:
            raise ValueError(f"lack `result` in case {number}")
        return Call(has["call"], list(has.get("args", ())), dict(has.get("kwargs", {})),
                    (has["result"],))  # fmt: skip
    if "stdout" in has:
        return Script(_joined(has.get("stdin", "")), _joined(has["stdout"]))
    if "output" in has:
        kind = has.get("type", has.get("testtype", ""))
        about = has.get("metadata") or {}
        about = json.loads(about) if isinstance(about, str) else about
        name = has.get("fn_name") or about.get("func_name") or entry
        is_function = kind in ("function_call", "functional") or (name and "stdin" not in kind)
        if is_function and not name:
            raise ValueError(f"lack `fn_name` in case {number}, which calls a function")
        return _case(has.get("input", ""), has["output"], name if is_function else "")
    raise ValueError(
        f"have {', '.join(map(str, has)) or 'nothing'} in case {number}, and neither stdout, nor "
        "output, nor call"
    )


def _case(given: Any, wanted: Any, name: str) -> Script | Call:
    """A case of APPS, TACO, LiveCodeBench, open-r1 or verl."""
    if not name:
        return Script(_joined(given), _joined(wanted))
    if isinstance(given, str):  # an argument in each line, as JSON
        args = [_value(line) for line in given.splitlines() if line.strip()]
    else:
        args = list(given) if isinstance(given, (list, tuple)) else [given]
    wanted = _value(wanted) if isinstance(wanted, str) else wanted
    others = (wanted[0],) if isinstance(wanted, list) and len(wanted) == 1 else ()  # as APPS
    return Call(name, args, {}, (wanted, *others))


def _value(text: str) -> Any:
    """A value as JSON, or as Python writes it; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError):
            return text


def _joined(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _some(cases: list) -> Cases:
    if not cases:
        raise ValueError("have no case")
    return cases


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"are no Python: {error}") from error


def _tests_of(text: str, setup: str, entry: str) -> Checks:
    tree = _parsed(text)
    functions = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    if "check" in functions:
        if not entry:
            raise ValueError("define check(candidate), and no column `entry_point` tells of what")
        return Checks("check", (text,), setup, entry)
    if any(name.startswith(("test_", "Test")) for name in functions):
        if importlib.util.find_spec("pytest") is None:
            raise ValueError('are a pytest file; python -m pip install "pytest>=8"')
        return Checks("pytest", (text,), setup)
    asserts = [n for n in tree.body if isinstance(n, ast.Assert)]
    if not asserts:
        raise ValueError("hold no test function, no `check` and no assert")
    others = ast.unparse(ast.Module([n for n in tree.body if n not in asserts], []))
    return Checks("asserts", tuple(map(ast.unparse, asserts)), f"{setup}\n{others}")
