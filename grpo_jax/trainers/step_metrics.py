"""The metrics line of each step, from its rollout and its updates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grpo_jax.config import derived
from grpo_jax.devices import chips, memory, roofline
from grpo_jax.devices.compiling import Compiling
from grpo_jax.devices.phases import phase
from grpo_jax.environments import episode
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.messages.progress import Progress
from grpo_jax.metrics.writers import Writers
from grpo_jax.rewards import ensembles, groups, kinds, relations
from grpo_jax.rewards.scores import Scores
from grpo_jax.trainers import coefficients
from grpo_jax.trainers.guards import Guards
from grpo_jax.trainers.listeners import Listeners
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run


class StepLog:
    """Collects the metrics of a step's updates, and writes them in one line with the rollout's.

    The loop does not wait for them: an update's metrics are fetched when the next update has begun.
    Those of a step's last update are fetched during the next rollout, and close the line.
    """

    def __init__(
        self,
        run: Run,
        guards: Guards,
        writers: Writers,
        bar: Progress,
        listeners: Listeners,
        compiling: Compiling,
    ):
        self._run, self._guards, self._compiling = run, guards, compiling
        self._writers, self._bar, self._listeners = writers, bar, listeners
        # An update's metrics, those before it in its step, what controllers keep, and the step.
        self._unread: tuple[dict, list, dict, int] | None = None
        self._line: Callable[[], dict[str, float]] | None = None  # gives the open line's values
        self._step, self._started = 0, 0.0  # its step, and time.monotonic() at the step's start
        self._lock = threading.RLock()  # a stop closes the line from another thread
        self._read_at = 0.0  # time.monotonic() after the newest update
        self.waited_s = 0.0  # for the newest fetched update
        self.closed_at = 0.0  # time.monotonic() when the newest line was written

    def add_update(self, state: RunState, values: dict) -> None:
        """Takes an update's metrics, on the device, and fetches those of the previous update."""
        self.fetch()
        self._unread = values, state.update_metrics, state.coefficients, state.step + 1

    def fetch(self) -> None:
        """Waits for the newest update, and lets the guards check it.

        Where completions are given, a metric that is NaN beside a finite loss is a mean over none,
        as of a batch without rejected ones. It is left out.
        """
        with self._lock:
            if self._unread is None:
                return
            (values, update_metrics, kept, step), self._unread = self._unread, None
            began = time.monotonic()
            with phase("update"):
                values = {name: float(value) for name, value in jax.device_get(values).items()}
            if self._run.engine is None and np.isfinite(values[self._run.course.loss]):
                values = {name: value for name, value in values.items() if not np.isnan(value)}
            self.waited_s = time.monotonic() - began
            refused = bool(values.pop("skipped"))
            self._guards.check_update(step, values, refused=refused)
            update_metrics.append(values)
            if len(update_metrics) == self._run.course.updates:
                coefficients.follow(self._run, kept, _combined(update_metrics))
            self._read_at = time.monotonic()

    def open(
        self,
        state: RunState,
        lengths: tuple,
        sampled: tuple,
        started: float,
        learning: float,
        seconds: dict,
    ) -> None:
        """Opens the line of the state's step; `started`, `learning`: start of step and updates.

        `lengths`: of the prompts [P] and completions [P, G] of its updates; `sampled`: of all that
        were sampled. `seconds`: of its phases, as metrics; more may be added while the line is
        open.
        """
        run, roll_backs = self._run, state.history.roll_backs
        updates, skipped = state.train.num_updates, state.train.num_skipped
        rollout_metrics, update_metrics = state.rollout_metrics, state.update_metrics
        counters = memory.usage()
        if run.engine is not None:
            counters |= {"tokens/generated": state.tokens}

        def line() -> dict[str, float]:
            ended = max(self._read_at, learning)  # the latter if no update was made
            seconds["time/update_s"] = ended - learning
            values = rollout_metrics | _combined(update_metrics) | counters | seconds
            values |= self._compiling.since_last() | {
                "policy/skipped_updates": int(skipped),
                "guards/roll_backs": roll_backs,
                "policy/learning_rate": float(
                    run.learning_rate(np.int32(max(int(updates) - int(skipped) - 1, 0)))
                ),
            }
            if run.engine is None:
                section = run.course.loss.partition("/")[0]
                values[f"{section}/tokens_per_s"] = float(lengths[1].sum() / (ended - started))
            # Unknown if the run was stopped after the rollout, or if there was no update.
            elif "time/rollout_s" in seconds and update_metrics:
                step_s = ended - started
                values |= _rates(run, lengths, sampled, seconds["time/rollout_s"], step_s)
            return values

        self._step, self._line, self._started = state.step + 1, line, started

    def reopen(self, step: int, values: dict[str, float]) -> None:
        """Opens a line again from `values` of an earlier process."""
        self._step, self._line = step, lambda: dict(values)
        self._started = time.monotonic() - values.get("time/step_s", 0.0)

    def values(self) -> dict[str, float]:
        """The values of the open line, without an evaluation."""
        with self._lock:
            self.fetch()
            settled = self._line() | {"time/step_s": time.monotonic() - self._started}
            self._line = lambda: dict(settled)
            return dict(settled)

    def close(self, evaluated: dict[str, float] | None = None) -> None:
        """Writes the open line, if any, with the metrics of an evaluation."""
        with self._lock:
            if self._line is None:
                return
            values, self._line = self.values() | (evaluated or {}), None
            self._writers.scalars(self._step, values)
            self._bar.update(self._step, values)
            self._listeners.finished(self._step, values)
            self.closed_at = time.monotonic()


def _combined(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step's updates, combined: maxima by their maximum, others by their mean."""
    names = updates[0] if updates else ()
    return {
        n: float((max if n.endswith("_max") else np.mean)([v[n] for v in updates])) for n in names
    }


def rollout_metrics(run: Run, sampled: Rollout, scores: Scores) -> dict[str, float]:
    """Metrics of a rollout before its updates.

    `scores`: of the completions that are learned from. If others were sampled too, all count, since
    those that are left would be too good a sample of hard problems, and too bad a one of easy ones.
    """
    rollouts, draws = sampled.completions, sampled.draws
    length_PG, stopped_PG = rollouts.num_trained_PG, rollouts.stopped_PG
    varies_P = groups.vary(scores.reward_B.reshape(length_PG.shape))
    of_groups = {"groups/equal_share": 1 - varies_P.mean()}
    if draws is not None:
        length_PG, stopped_PG, scores = draws.length_NG, draws.stopped_NG, draws.scores
        of_groups |= {
            "groups/draws": draws.number,
            "groups/drawn": len(length_PG),
            "groups/dropped": draws.num_equal,
        }
    reward_PG = scores.reward_B.reshape(length_PG.shape)
    values: dict[str, Any] = {}
    if not np.isnan(reward_PG).all():
        values = {"reward": np.nanmean(reward_PG), "reward_std": np.nanstd(reward_PG)}
    if run.rewards.accuracy is not None:
        accuracy = scores.accuracy(run.rewards.accuracy)
        if not np.isnan(accuracy):
            values["accuracy"] = accuracy
    if run.rewards.rewards:
        unknown_B = scores.unknown_B
        values |= of_groups | {
            "rewards/unscored": (np.isnan(scores.reward_B) & ~unknown_B).sum(),
            "rewards/unknown_share": unknown_B.mean(),
        }
    values |= {
        "completion/length": length_PG.mean(),
        "completion/length_min": length_PG.min(),
        "completion/length_max": length_PG.max(),
        "completion/truncated_share": 1 - stopped_PG.mean(),
        "throughput/generated_tokens_per_s": length_PG.sum() / sampled.seconds,
    }
    if stopped_PG.any():
        values["completion/stopped_length"] = length_PG[stopped_PG].mean()
    for name, value_B in scores.by_name.items():
        if not np.isnan(value_B).all():
            values[f"reward/{name}"] = np.nanmean(value_B)
            values[f"reward/{name}_std"] = np.nanstd(value_B)
        values[f"rewards/failed/{name}"] = scores.failed[name].sum()
    if members := ensembles.members(run.rewards.rewards):
        values |= relations.metrics(scores, members, length_PG.ravel())
    for kind in {failure.kind for failure in scores.failures}:
        values[f"rewards/failed_by_{kind}"] = scores.num_failed(kind)
    for name, (total, count) in scores.metrics.items():
        values[name if name.startswith("judge/") else f"reward_log/{name}"] = total / count
    values |= scores.sums
    for reward in run.rewards.rewards:
        if reward.runs == kinds.HOST:
            found = _correlation(scores.by_name[reward.name], length_PG.ravel())
            if not np.isnan(found):
                values[f"judge/length_correlation/{reward.name}"] = found
    return {name: float(value) for name, value in values.items()}


def of_episodes(sampled: Rollout) -> dict[str, float]:
    """Metrics of a rollout's episodes; of several draws their means, and sums of what is counted.

    {} without environments.
    """
    if not sampled.told:
        return {}
    return episode.joined(sampled.told).metrics()


def of_given_up(sampled: Rollout, length_NG: np.ndarray) -> dict[str, float]:
    """Metrics of the groups that a step gave up, beside `length_NG`, tokens of those finished."""
    length_UG = sampled.given_up.length_NG
    tokens = length_UG.sum() + length_NG.sum()
    return {
        "groups/given_up": float(len(length_UG)),
        "tokens/given_up_share": float(length_UG.sum() / tokens),
        "throughput/generated_tokens_per_s": float(tokens / sampled.seconds),
    }


def _correlation(value_B: np.ndarray, length_B: np.ndarray) -> float:
    """Pearson's correlation of numbers with lengths, over the known ones; NaN if undefined."""
    known_B = ~np.isnan(value_B)
    value_B, length_B = value_B[known_B].astype(np.float64), length_B[known_B]
    if len(value_B) < 2 or value_B.std() < 1e-9 or length_B.std() == 0:
        return float("nan")
    return float(np.corrcoef(value_B, length_B)[0, 1])


def _rates(
    run: Run,
    lengths: tuple[np.ndarray, np.ndarray],
    sampled: tuple[np.ndarray, np.ndarray],
    rollout_s: float,
    step_s: float,
) -> dict[str, float]:
    """Tokens per second of a step, and the share of the devices' peak, if known.

    `lengths`, `sampled`: as for `StepLog.open`. `step_s` ends with the last update.
    """
    config, model, mesh = run.config, run.policy.model, run.mesh
    learning_s, learned = step_s - rollout_s, lengths[0].sum() + lengths[1].sum()
    iterations = config.algorithm.num_iterations
    rates = {
        "throughput/step_tokens_per_s": sampled[1].sum() / step_s,
        "throughput/learned_tokens_per_s": iterations * learned / learning_s,
    }
    chip = chips.chip(mesh.devices.flat[0].device_kind)
    if chip:
        sampling = roofline.rollout(model, *sampled, **run.engine.traffic)
        forth_and_back = 3 if run.frozen is None else 2  # frozen weights have no gradient
        passes = forth_and_back * iterations + bool(config.algorithm.kl_coef)
        passes += derived.needs_old_pass(config)
        learning = roofline.forward(model, *lengths).times(passes)
        least = [
            w.seconds(chip.bf16_flops, chip.hbm_bytes_per_s, mesh.size)
            for w in (sampling, learning)
        ]
        done = sampling.flops + learning.flops
        rates |= {
            "throughput/mfu": done / (step_s * chip.bf16_flops * mesh.size),
            "roofline/rollout_share": least[0] / rollout_s,
            "roofline/learning_share": least[1] / learning_s,
            "roofline/step_share": sum(least) / step_s,
        }
    return {name: float(value) for name, value in rates.items()}
