"""Saving where a run stands: when it is due, and when the run is told to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from grpo_jax import claim, position, sharding
from grpo_jax.drawing import Drawn
from grpo_jax.guards import Guards
from grpo_jax.lines import Lines
from grpo_jax.parts import Parts
from grpo_jax.position import Position
from grpo_jax.stop import Asked, Stopped, StopSignal
from grpo_jax.structs import Experience, TrainState

_SLOW_S = 1.0  # to wait for an update


class Saver:
    """Writes checkpoints of one run, whose position `at` goes along."""

    def __init__(
        self,
        parts: Parts,
        at: Position,
        stop: StopSignal,
        lines: Lines,
        guards: Guards,
        began: float,
    ):
        """`began`: time.monotonic() at the run's start, had it never been stopped."""
        self._parts, self._at, self._stop, self._began = parts, at, stop, began
        self._lines, self._guards = lines, guards
        self._slow = True  # whether updates take seconds; nobody knows of the first

    def save(
        self,
        state: TrainState,
        experience: Experience | None,
        ahead: Drawn | None,
        quality: float | None = None,
        *,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        """Saves where the run stands; `ahead`: what was sampled and is not in `experience` yet.

        `quality`: as `Checkpoints.save` has it. `sizes`: of packed rows, where they are not those
        of now. Raises ValueError where the folder is another run's by now.
        """
        claim.check()
        parts, at = self._parts, self._at
        at.wall_s = time.monotonic() - self._began
        at.ahead_s = 0.0 if ahead is None else ahead.seconds
        rollouts = None if ahead is None else sharding.shard_rows(parts.mesh, ahead.rollouts)
        facts = position.facts(parts, at, sizes)
        parts.checkpoints.save(state, facts, experience=experience, ahead=rollouts, quality=quality)

    def stop(
        self,
        state: TrainState,
        experience: Experience | None,
        ahead: Drawn | None,
        sizes: dict[str, Any] | None = None,
    ) -> NoReturn:
        """Saves, and raises `Stopped`."""
        raise Stopped(self._saved(state, experience, ahead, sizes))

    @contextlib.contextmanager
    def may_stop_update(
        self, state: TrainState, experience: Experience, ahead: Drawn | None
    ) -> Iterator[Callable[[Any], None]]:
        """`may_stop` of an update; what it gives, takes the gradients once they are launched.

        Where updates take seconds it waits for them: what a device was given cannot be taken back,
        and only before the optimizer's step there is a state to save.
        """
        with self.may_stop(state, experience, ahead) as over:

            def before_donating(gradients: Any) -> None:
                began = time.monotonic()
                if self._slow:
                    jax.block_until_ready(gradients)
                self._slow = time.monotonic() - began + self._lines.waited_s > _SLOW_S
                over()

            yield before_donating

    @contextlib.contextmanager
    def may_stop(
        self, state: TrainState, experience: Experience | None, ahead: Drawn | None
    ) -> Iterator[Callable[[], None]]:
        """While entered, a stop gives up what is being done, and saves this.

        That is what the run holds as the context is entered. From the call of what it gives on, the
        state may be donated, and a stop waits.
        """
        sizes = position.sizes(self._parts)

        def leave() -> str:
            self._lines.read()
            if self._guards.has_orders:  # it would be undone: better computed again
                return (
                    f"Stopped by {self._stop.name} at step {self._at.step}, where a guard has "
                    "orders; nothing is saved. The same command continues the run."
                )
            return self._saved(state, experience, ahead, sizes)

        with self._stop.leaving(leave) as over:
            try:
                yield over
            except Asked:
                self._lines.read()
                self._guards.obey(before=self._lines.close)
                self.stop(state, experience, ahead, sizes)

    def _saved(self, state, experience, ahead, sizes: dict[str, Any] | None) -> str:
        """Saves, and says so."""
        at, parts = self._at, self._parts
        if not (at.step or at.update or at.first_evaluation or ahead):
            parts.checkpoints.close()
            return (
                f"Stopped by {self._stop.name} in the first rollout; there is nothing to save. The "
                "same command begins again."
            )
        if not at.unevaluated:
            self._lines.close()  # before saving: a resumed run finds the line there
        self.save(state, experience, ahead, sizes=sizes)
        parts.checkpoints.close()
        middle = f", after {at.update} of its updates" if at.update else ""
        return (
            f"Stopped by {self._stop.name} at step {at.step}{middle}; all is saved in "
            f"{parts.folder}. The same command continues the run."
        )
