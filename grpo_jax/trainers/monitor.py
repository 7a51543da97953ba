"""Everything beside the algorithm that happens while a run trains, kept out of the loop.

`with monitor.phase("rollout", state)` names a phase once for all uses: the profiler's scope, the
watchdog, the seconds in the step's line, out-of-memory messages, and a stop, which aborts the phase
and saves `state` as it was before. When the phase ends, the guards are enforced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from grpo_jax.config.dotted import flatten
from grpo_jax.devices import transfer
from grpo_jax.devices.compiling import Compiling
from grpo_jax.devices.phases import Trace, phase
from grpo_jax.environments.rewarding import FailureReports, RewardCollector, SelectedRewards
from grpo_jax.environments.single_turn import Draws, GivenUp, Rollout
from grpo_jax.hosts import processes
from grpo_jax.hosts.watchdog import Watchdog
from grpo_jax.messages.progress import Progress
from grpo_jax.metrics import writers
from grpo_jax.rewards.scores import RewardError, Scores
from grpo_jax.run import claim
from grpo_jax.run.stop import Asked, Stopped, StopSignal
from grpo_jax.trainers import (
    coefficients,
    guards,
    prompt_choice,
    rollout,
    run_state,
    step_metrics,
    tracking,
)
from grpo_jax.trainers.listeners import Listeners
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run
from grpo_jax.trainers.step_metrics import StepLog

_SLOW_S = 1.0  # wait for an update

_WHAT = {  # for the watchdog; steps are counted from 1
    "rollout": "The rollout of {noun} {following}",
    "scoring": "The rewards of {noun} {following}",
    "update": "Update {update} of {noun} {following}",
    "evaluation": "The evaluation after {noun} {step}",
}


class Monitor:
    """Watches, logs, guards and stops one run; a context manager."""

    def __init__(
        self, run: Run, state: RunState, stop: StopSignal, compiling: Compiling, began: float
    ):
        """`began`: time.monotonic() at which a run without interruptions would have begun."""
        self._run, self._stop, self._began = run, stop, began
        course = run.course
        self._open = contextlib.ExitStack()
        enter = self._open.enter_context
        self._writers = enter(
            contextlib.closing(
                writers.Writers(
                    run.folder,
                    first_step=state.step + (not state.unevaluated) if state.step else 0,
                    first_sample_step=state.sampled + 1,  # before any update
                    tensorboard=run.config.logging.tensorboard,
                    trackers=tracking.asked(run.config, course.is_tracked),
                    config=flatten(run.config),
                    enabled=processes.is_first(),
                )
            )
        )
        self._bar = enter(
            Progress(
                course.num_steps,
                first_step=state.step,
                every_steps=course.shown_every,
                noun=course.bar,
            )
        )
        self._watchdog = enter(Watchdog(run.config.loop.stall_timeout_s))
        self._trace = enter(Trace(run.folder, course.profiled))
        self.guards = guards.Guards(
            run.config,
            state.history,
            run.checkpoints.folder,
            updates_per_step=course.updates,
            loss=course.loss,
            learning_rate=course.learning_rate,
        )
        self._listeners = Listeners(run.callbacks, run.folder, stop)
        self.log = StepLog(run, self.guards, self._writers, self._bar, self._listeners, compiling)
        self._failures = FailureReports()
        self._seconds: dict[str, float] = {}  # of this step's phases, as metrics
        self._sampled: tuple[Any, Any] | None = None  # lengths of a step's prompts and completions
        self._started = self._learning = 0.0  # time.monotonic() when step and updates began
        self._over: Callable[[], None] = lambda: None
        self._slow = True  # whether updates take seconds; assumed for the first

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self._open.__exit__(*error)

    # --- Phases -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str, state: RunState) -> Iterator[None]:
        """A phase of the run, one of `phases.PHASES`; a stop in it saves `state` as it is now.

        A RewardError or TooFewGroups in it saves too. Raises `memory.OutOfMemory` if a device has
        too little memory, `Stopped` after a stop has saved, and at its end a guard's order.
        """
        course = self._run.course
        where = {"step": state.step, "following": state.step + 1, "update": state.update + 1}
        self._watchdog.phase(_WHAT[name].format(noun=course.step, **where))
        self._bar.begin(name)
        scope = course.update_phase if name == "update" else name
        with phase(scope), self._may_stop(state) as self._over:
            try:
                yield
            except (RewardError, guards.TooFewGroups):
                self._over()
                if state.step:
                    self.save(state)
                self._run.checkpoints.close()
                raise
        self.guards.enforce()

    @contextlib.contextmanager
    def first_evaluation(self) -> Iterator[None]:
        """The evaluation before the first step; a stop in it saves nothing."""
        self._watchdog.phase("The evaluation before the first step")
        with self._stop.nothing_to_lose():
            yield

    def alive(self) -> None:
        """Notes progress in a phase; aborts it if the run is to stop."""
        self._watchdog.alive()
        self._stop.look()

    def donates(self, gradients: Any) -> None:
        """Called in an update's phase: from now on the state before the update cannot be saved.

        If updates take seconds, it waits for the gradients: launched work cannot be taken back, and
        a stop can save a state only before the optimizer's step.
        """
        began = time.monotonic()
        if self._slow:
            jax.block_until_ready(gradients)
        self._slow = time.monotonic() - began + self.log.waited_s > _SLOW_S
        self._over()

    @contextlib.contextmanager
    def _timed(self, metric: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[metric] = self._seconds.get(metric, 0.0) + time.monotonic() - start

    # --- The parts of a step, as they are done ----------------------------------------------------

    def begin_step(self, state: RunState) -> None:
        """Notes that the loop's next step begins."""
        self._trace.begin(state.step + 1, self.log.close)
        self._started, self._learning = time.monotonic(), 0.0

    def sampled(self, state: RunState, sampled: Rollout) -> None:
        """Notes that a step's completions are there; they may have been sampled earlier."""
        self.log.close()  # if the last step sampled nothing, the line is open
        self.guards.enforce()
        self._started = time.monotonic() - sampled.seconds
        self._seconds["time/rollout_s"] = sampled.seconds
        if self._stop.asked():
            self._stop_with(state)

    def rewards(
        self,
        state: RunState,
        collector: RewardCollector | SelectedRewards,
        draws: Draws | None = None,
    ) -> Scores:
        """Waits for the rewards; raises RewardError if they failed too often.

        `draws`: all that was drawn, if the collector has a part of it.
        """
        with phase("rewards"), self._timed("time/reward_s"):
            scores = collector.scores()
        self.check_rewards(state, draws.scores if draws else scores)
        return scores

    def check_rewards(self, state: RunState, scores: Scores) -> None:
        """Reports the failed rewards of a step; raises RewardError if they failed too often."""
        step = state.step + 1
        self.guards.check_scores(step, scores)
        self._failures.tell(f"step {step}", scores)

    def scored(
        self,
        state: RunState,
        sampled: Rollout,
        scores: Scores,
        advantage_PG: Callable[[], np.ndarray],
    ) -> None:
        """Checks a step's rewards; `guards.skips_rollout` then tells whether to skip updates.

        `advantage_PG()`: the advantages of the completions, to show beside some of them.
        """
        drawn, of_drawn = self._run.demonstrations.drawn(sampled, scores)
        state.rollout_metrics = step_metrics.rollout_metrics(self._run, drawn, of_drawn)
        state.rollout_metrics |= self._run.demonstrations.metrics(sampled, scores)
        state.rollout_metrics |= step_metrics.of_episodes(sampled)
        state.rollout_metrics |= coefficients.in_force(self._run, state)
        state.rollout_metrics |= prompt_choice.measure(self._run, state, drawn, of_drawn)
        self._sampled = None
        if drawn is not sampled:  # given tokens are trained on, and were not sampled
            self._sampled = drawn.completions.prompt_length_P, drawn.completions.length_PG
            state.tokens += int(self._sampled[1].sum() - sampled.completions.num_trained_PG.sum())
        if (draws := sampled.draws) is not None:  # the completions that are not learned from
            self._sampled = draws.prompt_length_N, draws.length_NG
            state.prompts += len(draws.problem_N) - self._run.course.prompts
            state.tokens += int(draws.length_NG.sum() - sampled.completions.num_trained_PG.sum())
        if (given_up := sampled.given_up) is not None:
            self._count_given_up(state, drawn, given_up)
        where = self._run, self._writers, self._listeners, state.step + 1
        rollout.show(*where, sampled, scores, advantage_PG)
        self.guards.check_rollout(state.step + 1, state.rollout_metrics)
        if self.guards.skips_rollout:
            self.guards.skipped(state.step + 1, self._run.course.updates)
        self.guards.enforce()

    def _count_given_up(self, state: RunState, drawn: Rollout, given_up: GivenUp) -> None:
        """Counts the prompts and tokens of groups that a step has begun and not finished."""
        lengths = self._sampled or (
            drawn.completions.prompt_length_P,
            drawn.completions.num_trained_PG,
        )
        begun = given_up.length_NG.any(axis=1)
        unfinished = given_up.prompt_length_N[begun], given_up.length_NG[begun]
        self._sampled = tuple(np.concatenate(pair) for pair in zip(lengths, unfinished))
        state.prompts += len(given_up.length_NG)
        state.tokens += int(given_up.length_NG.sum())
        state.rollout_metrics |= step_metrics.of_given_up(drawn, lengths[1])

    def given(self, state: RunState, rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Notes that a step's completions are given, not sampled; shows `rows()` as samples."""
        self.log.close()
        self.guards.enforce()
        rollout.show_rows(self._run, self._writers, self._listeners, state.step + 1, rows)

    def begin_updates(self) -> None:
        """Notes that a step's updates begin or continue."""
        self._learning = time.monotonic()

    def updated(self, state: RunState, values: dict[str, Any]) -> None:
        """Notes a launched update; `values`: its metrics, on the device."""
        self.log.add_update(state, values)
        self.guards.enforce()
        state.update += 1
        if state.update < self._run.course.updates and self._stop.asked():
            self.log.fetch()
            self.guards.enforce()
            self._stop_with(state)

    def learned(self, state: RunState) -> None:
        """Opens a step's line when all of its updates are launched."""
        rollouts = state.experience.rollouts
        chosen_PGC = rollouts.chosen_PGC  # counted on the host: a plan lists a device's programs
        counted = rollouts.length_PG if chosen_PGC is None else chosen_PGC
        lengths = transfer.to_host((rollouts.prompt_length_P, counted))
        if chosen_PGC is not None:
            lengths = lengths[0], lengths[1].sum(-1)
        state.tokens += int(lengths[1].sum())
        state.prompts += self._run.course.prompts
        sampled = self._sampled or lengths
        self.log.open(state, lengths, sampled, self._started, self._learning, self._seconds)
        self._seconds = {}

    def finished(self, state: RunState) -> None:
        """Notes a finished step; if something is due after it, waits for its metrics."""
        run, is_last = self._run, state.step == self._run.course.num_steps
        stops = self._stop.asked() and not is_last
        run.checkpoints.poll()
        if stops or run.evaluates_after(state.step) or run.saves_after(state.step):
            self.log.fetch()
            self.guards.enforce(before=self.log.close)  # before anything is saved
        if stops:
            state.unevaluated = self.log.values() if run.evaluates_after(state.step) else {}
            self._stop_with(state)

    def evaluated(self, when: str, scores: Scores) -> None:
        """Checks the rewards of an evaluation; raises RewardError if they failed too often."""
        self.guards.check_evaluation(when, scores)
        self._failures.tell(when, scores)

    def evaluated_at_start(self, state: RunState) -> None:
        """Writes the evaluation before the first step; again if that step was stopped."""
        self._writers.scalars(0, state.first_evaluation)
        self._listeners.finished(0, state.first_evaluation)

    # --- Saving -----------------------------------------------------------------------------------

    def checkpoint(self, state: RunState, quality: float | None) -> None:
        """Begins the checkpoint that is due; its time is in the next step's line."""
        self._watchdog.phase(f"The checkpoint after {self._run.course.step} {state.step}")
        with phase("checkpoint"), self._timed("time/checkpoint_s"):
            self.save(state, quality)

    def save(self, state: RunState, quality: float | None = None, **options: Any) -> None:
        """Begins a checkpoint; arguments as for `run_state.save`.

        Raises ValueError if another run has taken the folder.
        """
        claim.check()
        state.wall_s = time.monotonic() - self._began
        run_state.save(self._run, state, quality=quality, **options)

    @contextlib.contextmanager
    def _may_stop(self, state: RunState) -> Iterator[Callable[[], None]]:
        """While entered, a stop aborts the work in progress and saves the state as it is now.

        After the yielded function is called, the train state may be donated, and a stop waits.
        """
        state, sizes = dataclasses.replace(state), run_state.sizes(self._run)

        def leave() -> str:
            self.log.fetch()
            if self.guards.has_orders:  # it would be undone: recomputing is better
                return (
                    f"Stopped by {self._stop.name} at step {state.step}, where a guard has "
                    "orders; nothing is saved. The same command continues the run."
                )
            return self._saved(state, sizes)

        # Save outside of the context, which waits while the other thread saves: never both at once.
        try:
            with self._stop.leaving(leave) as over:
                yield over
        except Asked:
            self.log.fetch()
            self.guards.enforce(before=self.log.close)
            raise Stopped(self._saved(state, sizes)) from None

    def _stop_with(self, state: RunState) -> NoReturn:
        raise Stopped(self._saved(state, None))

    def _saved(self, state: RunState, sizes: dict[str, Any] | None) -> str:
        """Saves; returns the message."""
        run, name = self._run, self._stop.name
        has_begun = state.sampled or state.first_evaluation
        if not has_begun and state.next_rollout is None:
            run.checkpoints.close()
            return (
                f"Stopped by {name} in the first rollout; there is nothing to save. The "
                "same command begins again."
            )
        if not state.unevaluated:
            self.log.close()  # before saving: a resumed run finds the line there
        self.save(state, sizes_then=sizes)
        run.checkpoints.close()
        middle = f", after {state.update} of its updates" if state.update else ""
        return (
            f"Stopped by {name} at {run.course.step} {state.step}{middle}; all is saved in "
            f"{run.folder}. The same command continues the run."
        )
