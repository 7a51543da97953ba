"""What is done where the numbers of a step are out of bounds, so that a run can be left alone.

Each guard has its bounds and its action in the config. It looks at numbers that all processes
share, and what it remembers of former steps is a part of where the run stands: its decisions are
the same on all processes, and in a run that was stopped and continued.

Updates that are refused, because they are not finite or by a guard whose action is "skip", are
refused on the device, by the update itself: nothing waits for their numbers. These are read an
update later, those of a step's last while the next rollout is drawn, and only then "roll_back" and
"stop" are obeyed. No checkpoint is written in between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import guard_rules
from grpo_jax.messages import events
from grpo_jax.messages.console import say
from grpo_jax.metrics.names import METRICS
from grpo_jax.rewards.scores import RewardError, Scores


class Diverged(ValueError):  # noqa: N818
    """A guard ends the run.

    Nothing is saved then: a restart goes on from the last checkpoint, and does not come a step
    further each time.
    """


class RollBack(Exception):  # noqa: N818  (not an error)
    """The run shall go on from its last checkpoint, with other prompts than since then."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step  # the last of the steps that are undone, counted from 1


@dataclasses.dataclass
class History:
    """What the guards remember of the steps before; a part of where a run stands."""

    rewards: list[float] = dataclasses.field(default_factory=list)  # means of the newest steps
    best_reward: float | None = None  # largest mean of guards.window steps
    equal_steps: int = 0  # steps in a row whose groups all had equal rewards
    skipped_in_row: int = 0  # updates
    roll_backs: int = 0


class Guards:
    """Looks at the numbers of each step; `enforce` then raises what they ask for.

    What is only told, is told the 1st, 2nd, 4th, 8th ... time.
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
        """`kept_in`: where the checkpoints are, to be told; `learning_rate`: the option, too.

        `loss`: the metric that must be finite.
        """
        self._updates, self._loss, self._learning_rate = updates_per_step, loss, learning_rate
        self._config, self._history, self._kept_in = config, history, kept_in
        self._actions = guard_rules.actions_of(config)
        self._order: tuple[str, int, str] | None = None  # action, step and message
        self._times: dict[str, int] = {}
        self._worked: set[str] = set()  # rewards that a completion got since the program began
        self.skips_rollout = False  # whether the updates on the newest rollout shall not be made

    @property
    def has_orders(self) -> bool:
        """Whether `enforce` would raise."""
        return self._order is not None

    def check_scores(self, step: int, scores: Scores) -> None:
        """Looks for rewards that failed too often; raises `RewardError` where that ends the run."""
        self.skips_rollout = False
        for text in self._broken(f"Step {step}", scores):
            self._found("failed_rewards", step, text, "Its updates are left out.")

    def check_evaluation(self, when: str, scores: Scores) -> None:
        """The same of an evaluation; what does not end the run there is left to its metrics."""
        self._broken(when, scores)

    def _broken(self, when: str, scores: Scores) -> list[str]:
        """What to say of rewards that failed too often; raises it where that ends the run."""
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
        """Looks at the metrics of a step's rollout, before its updates."""
        options, history = self._config.guards, self._history
        reward = values.get("reward", math.nan)  # absent where nothing was scored
        if math.isinf(reward):
            each = ", ".join(f"{n} {v:g}" for n, v in values.items() if n.startswith("reward/"))
            text = f"the mean reward is {reward}: weighted, rewards are beyond float32 ({each})"
            self._found("nonfinite", step, text, "Its updates are left out.")
            self.skips_rollout |= self._actions["nonfinite"] == "skip"
        elif not math.isnan(reward):
            history.rewards = [*history.rewards, reward][-options.window :]
            self._check_fall(step)
        all_equal = values["groups/equal_share"] == 1
        history.equal_steps = history.equal_steps + 1 if all_equal else 0
        if options.equal_groups_steps and history.equal_steps >= options.equal_groups_steps:
            text = (
                f"groups/equal_share has been 1 for {history.equal_steps} steps, so nothing is "
                f"learned; guards.equal_groups_steps = {options.equal_groups_steps}"
            )
            self._found("equal_groups", step, text, "Its updates are left out.")

    def _check_fall(self, step: int) -> None:
        """Whether the mean reward of the newest steps has fallen too far below its best."""
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

    def check_update(self, step: int, values: Mapping[str, float], *, refused: bool) -> None:
        """Looks at the metrics of an update; `refused`: the device did not make it."""
        loss, grad_norm = values[self._loss], values["policy/grad_norm"]
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            text = f"the loss is {loss:g} and the norm of its gradient {grad_norm:g}"
            self._found("nonfinite", step, text, "The update was refused.")
        for metric, (low, high) in guard_rules.bounds(self._config).items():
            if metric not in values:  # of a loss that has none
                continue
            value = np.float32(values[metric])  # so it is compared as on the device
            if value < low or value > high:
                side, bound = ("below", low) if value < low else ("above", high)
                option = f"guards.{guard_rules.guard(metric)}_{'min' if side == 'below' else 'max'}"
                text = f"{metric} is {value:.4g} {METRICS[metric].unit}, {side} {option} = {bound}"
                self._found(guard_rules.guard(metric), step, text, "The update was refused.")
        self._count(step, 1 if refused else 0, f" (loss {loss:g}, gradient norm {grad_norm:g})")

    def skipped(self, step: int, updates: int) -> None:
        """Notes updates on a rollout that were not made, as `skips_rollout` asked."""
        self._count(step, updates, "")

    def _count(self, step: int, refused: int, last: str) -> None:
        """Counts updates that were refused in a row; 0: one was made.

        As many as `max_skipped` steps have are too many: of a step that is left out all are refused
        at once, however many it has.
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
        """Raises `RollBack` or `Diverged`, after calling `before`, where the numbers ask for it."""
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
        """Tells what a guard found, or orders what its action says."""
        action = self._actions[guard]
        message = f'Step {step}: {text.rstrip(".")} (guards.{guard} = "{action}").'
        if action in ("roll_back", "stop"):
            self._order_at_least(action, step, message)
            return
        if action == "skip" and guard in ("failed_rewards", "reward", "equal_groups"):
            self.skips_rollout = True
        times = self._times[guard] = self._times.get(guard, 0) + 1
        if times & (times - 1) == 0:
            message += f" {skipping}" if action == "skip" else ""
            say(f"warning: {message}")
            events.happened("guard", message, guard=guard, step=step, action=action)

    def _order_at_least(self, action: str, step: int, message: str) -> None:
        if self._order is None or (self._order[0], action) == ("roll_back", "stop"):
            self._order = action, step, message
