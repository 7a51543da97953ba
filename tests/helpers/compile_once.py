"""Lets a test process compile a program once, however many functions are traced to it.

Most tests build their own scorer, engine or update, whose programs are those of another test. A
program is the same if its code, names, options and devices are, to the byte; then the executable
is shared. What JAX logs and counts as compiled is unchanged: it asks for every one of them.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from typing import Any

from jax._src import compiler

_KEPT = 64  # executables, of some megabytes each
_made: OrderedDict[bytes, Any] = OrderedDict()


def install() -> None:
    """From now on; the private function is JAX's of 0.10, and a later one may do without."""
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
            _made[key] = compiled()
            if len(_made) > _KEPT:
                _made.popitem(last=False)
        _made.move_to_end(key)
        return _made[key]

    once.once = True
    compiler.backend_compile_and_load = once
