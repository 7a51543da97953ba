"""Measures how a function's work grows, without other work on the machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def processor_s(run: Callable[[], object]) -> float:
    """Seconds of processor time that a call takes in this thread."""
    began = time.thread_time()
    run()
    return time.thread_time() - began


def assert_linear(run: Callable[[int], object], size: int) -> None:
    """Asserts that 4 times the `size` takes closer to 4 times the processor time than to 16 times.

    It takes the best of three. Times too short for the clock's resolution pass.
    """

    def seconds(n: int) -> float:
        return min(processor_s(lambda: run(n)) for _ in range(3))

    small_s, large_s = seconds(size), seconds(4 * size)
    assert large_s < 8 * small_s + 0.02, f"{small_s:.3f} s of {size}, {large_s:.3f} s of 4 times"
