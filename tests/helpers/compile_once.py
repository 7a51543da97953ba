"""Lets a test process compile a program once, however many functions are traced to it.

Most tests build their own scorer, engine or update, whose programs are those of another test. A
program is the same if its code, names, options and devices are, to the byte; then the executable
is shared. What JAX logs and counts as compiled is unchanged: it asks for every one of them.

JAX makes a context of MLIR for each program, which takes most of the time to lower a small one.
Here a thread's programs have one.

Of processes that run one program together, the first compiles it, and the others read it from the
folder that GRPO_JAX_TEST_TOGETHER names.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax._src import compiler
from jax._src.interpreters import mlir

_OF_A_CONTEXT = 200  # programs: it keeps their constants
_WAIT_S = 120  # for the first process
_KEPT = 64  # executables, of some megabytes each
_made: OrderedDict[bytes, Any] = OrderedDict()


def install() -> None:
    """From now on; private functions are JAX's of 0.10, and a later one may do without."""
    _share_contexts()
    compile_and_load = getattr(compiler, "backend_compile_and_load", None)
    if compile_and_load is None or hasattr(compile_and_load, "once"):
        return

    def once(backend, module, executable_devices, options, host_callbacks):
        def compiled():
            return compile_and_load(backend, module, executable_devices, options, host_callbacks)

        if host_callbacks or backend.platform != "cpu":
            return compiled()
        code = io.BytesIO()
        module.operation.write_bytecode(file=code)
        key = hashlib.sha256(code.getvalue())
        key.update(options.SerializeAsString())
        key.update(repr([(id(backend), d.id) for d in executable_devices]).encode())
        key = key.digest()
        if key not in _made:
            load = lambda data: backend.deserialize_executable(data, executable_devices, options)  # noqa: E731
            processes = {d.process_index for d in executable_devices}
            if len(processes) > 1 and "GRPO_JAX_TEST_TOGETHER" in os.environ:
                is_first = backend.process_index() == min(processes)
                _made[key] = _together(code, compiled, None if is_first else load)
            else:
                _made[key] = compiled()
            if len(_made) > _KEPT:
                _made.popitem(last=False)
        _made.move_to_end(key)
        return _made[key]

    once.once = True
    compiler.backend_compile_and_load = once


def _share_contexts() -> None:
    make = getattr(mlir, "make_ir_context", None)
    if make is None or hasattr(make, "once"):
        return
    own = threading.local()

    def make_ir_context():
        if sys._getframe(1).f_globals["__name__"] != mlir.__name__:
            return make()  # of a kernel, which registers its own dialects
        own.left = getattr(own, "left", 0) - 1
        if own.left < 0:
            own.context, own.left = make(), _OF_A_CONTEXT
        return own.context

    make_ir_context.once = True
    mlir.make_ir_context = make_ir_context


def _together(
    code: io.BytesIO, compiled: Callable[[], Any], load: Callable[[bytes], Any] | None
) -> Any:
    """A program that all processes ask for in the same order; `load` None: the first of them."""
    name = hashlib.sha256(code.getvalue()).hexdigest()
    file = Path(os.environ["GRPO_JAX_TEST_TOGETHER"], name)
    if load is None:
        made, new = compiled(), file.with_suffix(".new")
        new.write_bytes(made.serialize())
        new.rename(file)
        return made
    end = time.monotonic() + _WAIT_S
    while not file.exists():
        if time.monotonic() > end:
            return compiled()
        time.sleep(0.01)
    return load(file.read_bytes())
