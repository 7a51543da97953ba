"""Guards react to metrics that are out of bounds, so that a run needs no watching.

Each guard has its bounds and its action in the config. Its inputs are the same on all processes,
and its memory of earlier steps is part of the run's state. So decisions are the same on all
processes, and in a run that was stopped and continued.

The compiled update itself refuses an update that is not finite, or that a guard with the action
"skip" rejects, so nothing waits for metrics. Metrics are read one update later, and those of a
step's last update during the next rollout. Only then "roll_back" and "stop" act. No checkpoint is
written in between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import derived, guard_rules
from grpo_jax.messages import events
from grpo_jax.messages.console import say
from grpo_jax.metrics.names import METRICS
from grpo_jax.rewards import ensembles, registry
from grpo_jax.rewards.scores import RewardError, Scores


class Diverged(ValueError):  # noqa: N818
    """A guard ends the run.

    Nothing is saved, so that a restart goes on from the last checkpoint and does not get one step
    further each time.
    """


class TooFewGroups(ValueError):  # noqa: N818
    """A step found too few groups with a gradient; the state before it is saved."""


class RollBack(Exception):  # noqa: N818  (not an error)
    """The run must go back to its last checkpoint and continue with other prompts."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step  # the last step to undo, counted from 1


@dataclasses.dataclass
class History:
    """The guards' memory of earlier steps; part of the run's state."""

    rewards: list[float] = dataclasses.field(default_factory=list)  # means of the newest steps
    best_reward: float | None = None  # largest mean of guards.window steps
    equal_steps: int = 0  # steps in a row whose groups all had equal rewards
    skipped_in_row: int = 0  # updates
    # Of each member of an ensemble: mean and deviation in the newest steps, of two windows
    members: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    roll_backs: int = 0


class Guards:
    """Checks the metrics of each step; `enforce` then raises the resulting order.

    A guard that only warns does so the 1st, 2nd, 4th, 8th ... time.
    """

    def __init__(
        self,
        config: ConfigDict,
        history: History,
        kept_in: str,
        *,
        updates_per_step: int,
        loss: str = "policy/loss",
        learning_rate: str = "optim.learning_rate",
    ):
        """`kept_in`: the checkpoint folder, and `learning_rate`: the option, both for messages.

        `loss`: the metric that must be finite.
        """
        self._updates, self._loss, self._learning_rate = updates_per_step, loss, learning_rate
        self._config, self._history, self._kept_in = config, history, kept_in
        self._actions = guard_rules.actions_of(config)
        self._members = ensembles.members(registry.named(config.rewards.names))
        self._order: tuple[str, int, str] | None = None  # action, step and message
        self._times: dict[str, int] = {}
        self._worked: set[str] = set()  # rewards that have given a value since the program began
        self.skips_rollout = False  # whether to skip the updates on the newest rollout

    @property
    def has_orders(self) -> bool:
        """Whether `enforce` would raise."""
        return self._order is not None

    def check_scores(self, step: int, scores: Scores) -> None:
        """Checks for rewards that failed too often; raises `RewardError` if that ends the run."""
        self.skips_rollout = False
        for text in self._broken(f"Step {step}", scores):
            self._found("failed_rewards", step, text, "Its updates are left out.")

    def check_evaluation(self, when: str, scores: Scores) -> None:
        """The same for an evaluation; failures that do not end the run only show in its metrics."""
        self._broken(when, scores)

    def _broken(self, when: str, scores: Scores) -> list[str]:
        """Messages on rewards that failed too often; raises them if that ends the run."""
        told = []
        broken = scores.broken(self._config.rewards.max_failed_share)
        for name, failed_B in scores.failed.items():
            text = broken.get(name)
            if not failed_B.all():
                self._worked.add(name)
            elif name not in self._worked:
                never = f"no completion has got the reward {name!r} since the start"
                if text is None:  # the limit is 1
                    say(f"warning: {when}: {never}.")
                else:
                    text = f"{never}: {text}"
            if text is None:
                continue
            if self._actions["failed_rewards"] == "stop":
                raise RewardError(f"{when}: {text}")
            told.append(text)
        return told

    def check_rollout(self, step: int, values: Mapping[str, float]) -> None:
        """Checks the metrics of a step's rollout, before its updates."""
        options, history = self._config.guards, self._history
        reward = values.get("reward", math.nan)  # absent if nothing was scored
        if math.isinf(reward):
            each = ", ".join(f"{n} {v:g}" for n, v in values.items() if n.startswith("reward/"))
            text = f"the mean reward is {reward}: weighted, rewards are beyond float32 ({each})"
            self._found("nonfinite", step, text, "Its updates are left out.")
            self.skips_rollout |= self._actions["nonfinite"] == "skip"
        elif not math.isnan(reward):
            history.rewards = [*history.rewards, reward][-options.window :]
            self._check_fall(step)
        self._check_members(step, values)
        all_equal = values.get("groups/equal_share") == 1  # absent without rewards
        all_equal &= not derived.learns_from_equal_rewards(self._config)
        history.equal_steps = history.equal_steps + 1 if all_equal else 0
        if options.equal_groups_steps and history.equal_steps >= options.equal_groups_steps:
            text = (
                f"groups/equal_share has been 1 for {history.equal_steps} steps, so nothing is "
                f"learned; guards.equal_groups_steps = {options.equal_groups_steps}"
            )
            self._found("equal_groups", step, text, "Its updates are left out.")

    def _check_fall(self, step: int) -> None:
        """Checks whether the mean reward of the newest steps is too far below its best."""
        options, history = self._config.guards, self._history
        if not options.reward_drop or len(history.rewards) < options.window:
            return
        mean = float(np.mean(history.rewards))
        best = mean if history.best_reward is None else max(mean, history.best_reward)
        history.best_reward = best
        bound = best - options.reward_drop * abs(best)
        if mean < bound:
            text = (
                f"the mean reward of {options.window} steps is {mean:.4g}, below {bound:.4g}: its "
                f"best is {best:.4g}, and guards.reward_drop = {options.reward_drop:g}"
            )
            self._found("reward", step, text, "Its updates are left out.")

    def _check_members(self, step: int, values: Mapping[str, float]) -> None:
        """Checks whether one member of an ensemble rose while another fell: a proxy is gamed.

        Means of guards.window steps are compared with those of as many steps before, in units of
        the member's own deviation.
        """
        limit, window = self._config.guards.member_shift, self._config.guards.window
        if not limit:
            return
        shifts: dict[str, float] = {}
        for name in self._members:
            if f"reward/{name}" not in values:
                continue
            now = [values[f"reward/{name}"], values[f"reward/{name}_std"]]
            rows = [*self._history.members.get(name, ()), now][-2 * window :]
            self._history.members[name] = rows
            if len(rows) == 2 * window:
                before, after = np.mean(rows[:window], axis=0), np.mean(rows[window:], axis=0)
                deviation = max((before[1] + after[1]) / 2, 1e-4)
                shifts[name] = float((after[0] - before[0]) / deviation)
        up, down = (pick(shifts, key=shifts.get, default="") for pick in (max, min))
        if up and shifts[up] >= limit and shifts[down] <= -limit:
            text = (
                f"the reward {up!r} rose by {shifts[up]:.2g} of its deviations while {down!r} fell "
                f"by {-shifts[down]:.2g}, over {window} steps and the {window} before; "
                f"guards.member_shift = {limit:g}"
            )
            self._found("members", step, text, "Its updates are left out.")

    def check_update(self, step: int, values: Mapping[str, float], *, refused: bool) -> None:
        """Checks the metrics of an update; `refused`: the device skipped it."""
        loss, grad_norm = values[self._loss], values["policy/grad_norm"]
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            text = f"the loss is {loss:g} and the norm of its gradient {grad_norm:g}"
            self._found("nonfinite", step, text, "The update was refused.")
        of_critic = [values.get(name, 0.0) for name in ("value/loss", "value/grad_norm")]
        if not all(map(math.isfinite, of_critic)):
            text = "the critic's loss is {:g} and the norm of its gradient {:g}".format(*of_critic)
            self._found("nonfinite", step, text, "The critic's update was refused.")
        for metric, (low, high) in guard_rules.bounds(self._config).items():
            if metric not in values:  # for a loss without it
                continue
            value = np.float32(values[metric])  # compared in float32, as on the device
            if value < low or value > high:
                side, bound = ("below", low) if value < low else ("above", high)
                option = f"guards.{guard_rules.guard(metric)}_{'min' if side == 'below' else 'max'}"
                text = f"{metric} is {value:.4g} {METRICS[metric].unit}, {side} {option} = {bound}"
                self._found(guard_rules.guard(metric), step, text, "The update was refused.")
        self._count(step, 1 if refused else 0, f" (loss {loss:g}, gradient norm {grad_norm:g})")

    def skipped(self, step: int, updates: int) -> None:
        """Counts the skipped updates of a rollout, after `skips_rollout`."""
        self._count(step, updates, "")

    def _count(self, step: int, refused: int, last: str) -> None:
        """Counts consecutive refused updates; 0: an update was made.

        The limit is the updates of `max_skipped` steps, since a skipped step refuses all of its
        updates at once.
        """
        options, history = self._config.guards, self._history
        history.skipped_in_row = history.skipped_in_row + refused if refused else 0
        if history.skipped_in_row >= options.max_skipped * self._updates:
            text = (
                f"Step {step}: {history.skipped_in_row} updates in a row were refused{last}: those "
                f"of guards.max_skipped = {options.max_skipped} steps. The policy is the one from "
                f"before. Where loss or gradient are not finite, lower {self._learning_rate}, set "
                "optim.max_grad_norm, or use model.dtype = float32; else see the warnings above, "
                f'and the guards that gave them (guards.after_skips = "{options.after_skips}").'
            )
            self._order_at_least(options.after_skips, step, text)

    def enforce(self, before: Callable[[], None] = lambda: None) -> None:
        """Calls `before` and raises `RollBack` or `Diverged`, if a guard has ordered it."""
        if self._order is None:
            return
        before()
        action, step, message = self._order
        done, limit = self._history.roll_backs, self._config.guards.max_roll_backs
        if action == "roll_back" and done < limit:
            raise RollBack(
                f"{message} Roll-back {done + 1} of guards.max_roll_backs = {limit}.", step
            )
        if action == "roll_back":
            message += f" The run was rolled back guards.max_roll_backs = {limit} times already."
        raise Diverged(f"{message} {self._kept_in} holds the last checkpoint.")

    def _found(self, guard: str, step: int, text: str, skipping: str) -> None:
        """Reports a guard's finding, or orders its action."""
        action = self._actions[guard]
        message = f'Step {step}: {text.rstrip(".")} (guards.{guard} = "{action}").'
        if action in ("roll_back", "stop"):
            self._order_at_least(action, step, message)
            return
        if action == "skip" and guard in ("failed_rewards", "reward", "members", "equal_groups"):
            self.skips_rollout = True
        times = self._times[guard] = self._times.get(guard, 0) + 1
        if times & (times - 1) == 0:
            message += f" {skipping}" if action == "skip" else ""
            say(f"warning: {message}")
            events.happened("guard", message, guard=guard, step=step, action=action)

    def _order_at_least(self, action: str, step: int, message: str) -> None:
        if self._order is None or (self._order[0], action) == ("roll_back", "stop"):
            self._order = action, step, message
