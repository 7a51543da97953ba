"""What a run is doing, in words: the phases of a step, in traces and where one runs out of memory.

    with phase("rollout"):
        ...

Inside the compiled programs the same words are scopes of their operations: `rollout/decode`,
`scoring`, `update/.../vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from grpo_jax.devices import memory

PHASES = ("start", "sft", "rollout", "rewards", "scoring", "update", "evaluation", "checkpoint")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Work of the phase of this name, one of PHASES; inside another one it is its own.

    Raises `memory.OutOfMemory` in place of JAX's error where a device has too little for it.
    """
    assert name in PHASES, name
    with jax.profiler.TraceAnnotation(name):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            refusal = memory.refusal(name, error)
            if refusal is None:
                raise
            raise refusal from error


class Trace:
    """A trace of some steps, written under `folder` while entered.

    `steps`: the first and the last, counted from 1, or none. TensorBoard and Perfetto open what
    `plugins/profile/` there holds; `python -m grpo_jax.profile` makes a table of it.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...]):
        self._folder, self._steps = folder, range(steps[0], steps[1] + 1) if steps else ()
        self._is_on, self._step = False, ExitStack()

    def begin(self, step: int, settle: Callable[[], None]) -> None:
        """Step `step` begins; `settle` waits until the device has done the one before."""
        self._step.close()
        if self._is_on != (step in self._steps):
            settle()
            self._switch()
        if self._is_on:
            self._step.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def _switch(self) -> None:
        self._is_on = not self._is_on
        if self._is_on:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of a function would hide the phases
            jax.profiler.start_trace(self._folder, profiler_options=options)
        else:
            jax.profiler.stop_trace()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_) -> None:
        self._step.close()
        if self._is_on:
            self._switch()
