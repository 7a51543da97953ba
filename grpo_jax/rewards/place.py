"""The location of a reward function in its file, and of an error that it raised."""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Callable

from grpo_jax.messages.credentials import redact
from grpo_jax.messages.values import cut

_FRAMES = 4  # frames shown of an error
_MAX_CHARS = 100  # of a line of code


def of_function(found: Callable) -> str:
    """File, line and first line of code of a function; "" if it has no source."""
    code = _code(found)
    if code is None:
        return ""
    return _shown(code.co_filename, code.co_firstlineno, code.co_name)


def of_error(error: BaseException, found: Callable) -> str:
    """The last frames of an error in the function's own file, and the frame that raised it.

    "" if no frame is in the user's file: the call failed before the function's first line.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    code = _code(found)
    own = [f for f in frames if code is not None and f[0].f_code.co_filename == code.co_filename]
    last = frames[-1:] if own and frames[-1] not in own else []
    places = {}  # a comprehension has its function's line
    for frame, line in own + last:
        places.setdefault((frame.f_code.co_filename, line), frame.f_code.co_name)
    return "; ".join(_shown(*at, name) for at, name in list(places.items())[-_FRAMES:])


def of_thread(ident: int) -> str:
    """The line at which a thread of this process is now, outside Python's import machinery."""
    frames = list(traceback.walk_stack(sys._current_frames().get(ident)))
    own = [f for f in frames if not f[0].f_code.co_filename.startswith("<")]
    frame, line = own[0]
    return _shown(frame.f_code.co_filename, line, frame.f_code.co_name)


def _code(found: Callable):
    """The code object of a function, or of a bound, wrapped or callable object's function."""
    while isinstance(found, functools.partial):
        found = found.func
    found = inspect.unwrap(found)
    return getattr(found if hasattr(found, "__code__") else type(found).__call__, "__code__", None)


def _shown(file: str, line: int, name: str) -> str:
    code = redact(linecache.getline(file, line).strip())
    if code.startswith("@"):  # a decorator is above the function's own line
        code = f"def {name}(...)"
    here = os.path.join(os.getcwd(), "")
    return f"{file.removeprefix(here)}, line {line}, in {name}: {cut(code, _MAX_CHARS)}"
