"""The phases of a step, by name: in profiler traces, and in out-of-memory errors.

    with phase("rollout"):
        ...

In compiled programs the same names are scopes of the operations: `rollout/decode`, `scoring`,
`update/.../vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from grpo_jax.devices import memory

PHASES = (
    *("start", "sft", "preference", "reward_model", "rollout", "rewards", "scoring", "update"),
    *("evaluation", "checkpoint"),
)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """While entered, work belongs to this phase, one of PHASES. Phases may be nested.

    Raises `memory.OutOfMemory` in place of JAX's error if a device has too little memory.
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
    """While entered, writes a profiler trace of some steps under `folder`.

    `steps`: the first and the last, counted from 1, or none. TensorBoard and Perfetto open the
    files in its `plugins/profile/`; `python -m grpo_jax.profile` makes a table of them.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...]):
        self._folder, self._steps = folder, range(steps[0], steps[1] + 1) if steps else ()
        self._is_on, self._step = False, ExitStack()

    def begin(self, step: int, settle: Callable[[], None]) -> None:
        """Notes that a step begins; `settle` waits until the device has done the step before."""
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
            options.python_tracer_level = 0  # tracing Python calls would hide the phases
            jax.profiler.start_trace(self._folder, profiler_options=options)
        else:
            jax.profiler.stop_trace()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_) -> None:
        self._step.close()
        if self._is_on:
            self._switch()
