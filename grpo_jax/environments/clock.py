"""Time limits within a process: what takes too long is interrupted, where Python can be.

A timer's signal raises an error in the main thread: it ends sleeps, loops and waiting for sockets,
and leaves the process as an error of the same place would. A library that computes without looking
up, or code that catches every error, is not ended by it; for these the trainer kills the process.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from grpo_jax.rewards import worker

_AGAIN_S = 0.3  # code that catches the error is interrupted again


class TookTooLong(BaseException):
    """Raised in code that exceeds its time limit; not an Exception, so that few catch it."""


_armed = False


def within(limit_s: float, call: Callable[[], Any]) -> Any:
    """The result of a call, waited for if it is awaitable; TookTooLong after `limit_s` seconds."""
    global _armed
    signal.signal(signal.SIGALRM, _raise)
    _armed = True
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(limit_s, 1e-3), _AGAIN_S)
            return waited_for(call())
        finally:
            _armed = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except TookTooLong:
        _armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        raise TookTooLong(f"took longer than {limit_s:.3g} s") from None


def _raise(number: int, frame: FrameType | None) -> None:
    if _armed:
        raise TookTooLong


def waited_for(value: Any) -> Any:
    """The value, or what an awaitable gives in this process's one event loop."""
    return worker.waited_for(value) if inspect.isawaitable(value) else value


def together(limit_s: float, calls: list[Callable[[], Any]]) -> list[tuple[Any, Any]]:
    """Results and errors of functions that return awaitables, waited for at once; in order."""

    async def one(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            return await asyncio.wait_for(call(), limit_s), None
        except TimeoutError as error:
            if str(error):  # the function's own
                return None, error
            return None, TookTooLong(f"took longer than {limit_s:.3g} s")
        except BaseException as error:
            return None, error

    async def every() -> list[tuple[Any, Any]]:
        return await asyncio.gather(*map(one, calls))

    return within(limit_s + 0.5, every)


def boot_s() -> float:
    """Seconds since the system began, the clock of its processes' beginnings; 0 without one."""
    known = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if known is None else time.clock_gettime(known)
