"""An import of a user's module that takes long is reported, and ended at a limit."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from grpo_jax.rewards import place

_TOLD_AFTER_S = 10.0  # until a slow import is reported


@contextlib.contextmanager
def limited(spec: str, limit_s: float) -> Iterator[None]:
    """Reports a slow import, and ends the process if the import exceeds the limit.

    No error can be raised from outside in a module that is being imported.
    """
    done, importing = threading.Event(), threading.get_ident()

    def watch() -> None:
        told_s = min(_TOLD_AFTER_S, limit_s)
        if done.wait(told_s):
            return
        at = place.of_thread(importing)
        print(f"rewards.names: {spec!r} is still being imported: {at}", file=sys.stderr)
        if done.wait(limit_s - told_s):
            return
        print(
            f"error: rewards.names: {spec!r} was not imported after rewards.start_timeout_s = "
            f"{limit_s:g} s. Let the module end its import, or raise the limit. It waits here: "
            f"{place.of_thread(importing)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    threading.Thread(target=watch, name="import", daemon=True).start()
    try:
        yield
    finally:
        done.set()
