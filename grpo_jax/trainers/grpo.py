"""Group Relative Policy Optimization: samples groups, rewards them, and updates the policy.

Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1 and algorithm 1. A step asks
`batch.prompts` questions and samples `batch.group` completions of each; a completion's advantage is
its reward relative to its group's; `num_iterations` times `minibatches` updates then learn from
them. A step's results follow from the config, the step's number and the state before it. So a run
that was stopped anywhere continues as if it had not been stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.devices import transfer
from grpo_jax.devices.phases import phase
from grpo_jax.learner import train_state
from grpo_jax.planning import fit
from grpo_jax.run import claim
from grpo_jax.run import stop as stop_lib
from grpo_jax.trainers import (
    coefficients,
    credit,
    grpo_run,
    refill,
    restarts,
    results,
    rollout,
    run_state,
)
from grpo_jax.trainers.listeners import Callback
from grpo_jax.trainers.monitor import Monitor
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run

Gather = Callable[[Run, RunState, Monitor], None]


def train(run: Run, state: RunState, monitor: Monitor, gather: Gather | None = None) -> None:
    """Trains until the last step and updates `state`. Raises `guards.RollBack` among others.

    `gather` sets the experience of the state's step: by default it samples and rewards.
    """
    gather = gather or sample_and_reward
    if state.step == 0:
        _evaluate_first(run, state, monitor)
    if state.unevaluated:  # stopped before the evaluation that was due
        monitor.log.reopen(state.step, state.unevaluated)
        _evaluate_and_save(run, state, monitor)
    while state.step < run.course.num_steps:
        monitor.begin_step(state)
        if state.experience is None:  # else: stopped between two updates
            gather(run, state, monitor)
        monitor.begin_updates()
        while state.update < run.course.updates:
            minibatch = state.update % run.course.minibatches
            with monitor.phase("update", state):
                state.train, values = run.update_of(state.step)(
                    state.train, state.experience, minibatch, monitor.donates, run.frozen
                )
            monitor.updated(state, values)
        monitor.learned(state)
        state.finish_step()
        run_state.refresh_reference(run, state)
        monitor.finished(state)
        _evaluate_and_save(run, state, monitor)


def sample_and_reward(run: Run, state: RunState, monitor: Monitor) -> None:
    """Sets the experience of the state's step; if sampling is ahead, also the next rollout."""
    if state.next_rollout is None:
        with monitor.phase("rollout", state):
            if run.config.prompts.drop_equal_groups:
                state.next_rollout = refill.sample(run, state, monitor)
            else:
                state.next_rollout = rollout.sample(run, state, monitor.log, monitor.alive)
    sampled, following = state.next_rollout, None
    if run.course.is_asynchronous and state.step + 1 < run.course.num_steps:
        # Samples with the weights before this step's updates. Meanwhile this step's rewards are
        # computed; the next step's are computed while the device updates.
        with monitor.phase("rollout", state):
            following = rollout.sample(run, state, monitor.log, monitor.alive, ahead=1)
    monitor.sampled(state, sampled)
    with monitor.phase("scoring", state):
        completions = rollout.device_rows(run, sampled.completions)
        reference = transfer.to_device_memory(state.reference)  # copies one in host memory
        weights = run.weights(state.train), reference, completions, run.critic_weights(state.train)
        log_probs = run.prepare.log_probs(*weights)
        scores = monitor.rewards(state, sampled.rewards, sampled.draws)  # device busy
        greedy = sampled.greedy and monitor.rewards(state, sampled.greedy)
        rewards = rollout.device_rewards(run, sampled, scores, greedy)
        by_token = credit.by_token(run, sampled, scores)
        experience = run.prepare(log_probs, *rewards, beside=by_token)
        state.experience = coefficients.given_to(run, experience, state)
        state.next_rollout = following
        state.count_draws(sampled)
    monitor.scored(state, sampled, scores, lambda: log_probs.in_order(state.experience.advantage))
    if monitor.guards.skips_rollout:
        state.train = train_state.refuse(state.train, run.course.updates)
        state.update = run.course.updates


def _evaluate_first(run: Run, state: RunState, monitor: Monitor) -> None:
    if run.is_evaluated and not state.update and not state.first_evaluation:
        with monitor.first_evaluation():
            state.first_evaluation = results.evaluate(run, state, monitor, final=True)
        state.accuracy_before = state.accuracy
        state.held_out_reward_before = state.held_out_reward
    if state.first_evaluation:
        monitor.evaluated_at_start(state)


def _evaluate_and_save(run: Run, state: RunState, monitor: Monitor) -> None:
    """Evaluates and saves if due after the finished step, and writes its metrics line.

    A stop during the evaluation saves everything; the continued run evaluates again.
    """
    evaluated: dict[str, float] = {}
    if run.evaluates_after(state.step):
        state.unevaluated = monitor.log.values()
        with monitor.phase("evaluation", state):
            is_last = state.step == run.course.num_steps
            evaluated = results.evaluate(run, state, monitor, final=is_last)
        state.unevaluated = {}
    if not evaluated and not run.saves_after(state.step):
        return
    monitor.log.close(evaluated)  # before saving: a resumed run finds the line there
    if run.saves_after(state.step):
        monitor.checkpoint(state, results.quality(run, evaluated))


def run(
    config: ConfigDict,
    folder: Path,
    model_path: str,
    *,
    spent_s: float = 0.0,
    stop: stop_lib.StopSignal | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> dict[str, Any]:
    """Trains the model at `model_path`, or continues the run in `folder`; returns its summary.

    `spent_s`: seconds spent on making the model, counted as part of the run. `stop`: the caller's
    stop signal; None: the run installs its own. `callbacks` are called after each step. Raises
    ValueError for a user's mistake, `guards.Diverged` if a guard ends the run, and `stop.Stopped`
    after a requested stop has saved.
    """
    began = time.monotonic() - spent_s
    with claim.held(), stop or stop_lib.StopSignal(config.checkpoint.save_before_s) as stop:
        with phase("start"), stop.nothing_to_lose():
            run = grpo_run.build(config, folder, model_path, fit.of_run)
            run = dataclasses.replace(run, callbacks=callbacks)
        with run.rewards, run.drawing:
            return restarts.carry_out(run, stop, began, train, results.finish)
