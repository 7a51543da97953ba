"""Carries a run from its newest checkpoint to its end, restarting it when a guard rolls it back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from grpo_jax.devices.compiling import Compiling
from grpo_jax.devices.phases import phase
from grpo_jax.hosts.watchdog import Watchdog
from grpo_jax.messages import events
from grpo_jax.messages.console import say
from grpo_jax.run.stop import StopSignal
from grpo_jax.trainers import guards, rollout, run_state
from grpo_jax.trainers.monitor import Monitor
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run

Train = Callable[[Run, RunState, Monitor], None]
Finish = Callable[[Run, RunState, StopSignal, float], Any]


def carry_out(run: Run, stop: StopSignal, began: float, train: Train, finish: Finish) -> Any:
    """Trains until `train` returns; returns the result of `finish(run, state, stop, wall_s)`.

    `began`: time.monotonic() when the command began. Raises `guards.Diverged` if a guard ends the
    run, and `stop.Stopped` after a requested stop has saved.
    """
    with phase("start"), stop.nothing_to_lose():
        state = run_state.newest(run)
    began -= state.wall_s
    with Compiling() as compiling:
        while True:
            try:
                _train_from(run, state, stop, compiling, began, train)
                break
            except guards.RollBack as order:
                say(f"warning: {order}")
                events.happened("guard", str(order), step=order.step, action="roll_back")
                undone = order.step
            except guards.Diverged:
                run.checkpoints.close()
                raise
            with phase("start"):
                state.train = state.experience = None  # frees the failed state's memory
                state = run_state.roll_back(run, state, undone)
    with Watchdog(run.config.loop.stall_timeout_s) as watchdog:
        watchdog.phase("The end of the run")
        return finish(run, state, stop, time.monotonic() - began)


def _train_from(
    run: Run,
    state: RunState,
    stop: StopSignal,
    compiling: Compiling,
    began: float,
    train: Train,
) -> None:
    with phase("start"), stop.nothing_to_lose():
        waiting = run_state.load(run, state)
    with Monitor(run, state, stop, compiling, began) as monitor:
        if waiting is not None:
            state.next_rollout = rollout.sampled_before(run, state, waiting)
        train(run, state, monitor)
