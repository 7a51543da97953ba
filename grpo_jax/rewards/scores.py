"""Scores of completions: the weighted sum of their rewards, and each reward by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from grpo_jax.rewards.registry import Reward
from grpo_jax.rewards.worker import Answer

FAILURES = ("timeout", "error", "values", "memory", "died", "invalid", "member")
"""Why a reward may be missing: too slow; raised; returned no fitting list of numbers; asked for too
much memory; its process ended; what it should judge is not valid (`left_out`); or a member of an
ensemble failed."""


_ARRAYS = {"by_name": np.float32, "failed": bool, "seconds": np.float64}  # per reward, [B]


class RewardError(ValueError):
    """Rewards cannot be computed at all, or too many of them failed."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """One completion whose reward could not be computed."""

    reward: str
    row: int
    kind: str  # one of FAILURES
    message: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of B completions.

    `Reward.on_failure` says what a failed reward counts as. "unknown": the completion has no
    reward, `reward_B` is NaN, and `unknown_B` True. An outage then punishes nothing. "least": the
    least value that its function gave to other completions, and at most 0. A text that breaks its
    grader then is not worth more than a wrong answer, and escapes no penalty.

    If every reward function gave None, `reward_B` is NaN, and `unknown_B` False.
    """

    reward_B: np.ndarray  # float32: the weighted sum; a reward that is None counts as 0
    by_name: dict[str, np.ndarray]  # float32 [B] per reward, unweighted; NaN: None or failed
    failed: dict[str, np.ndarray]  # bool [B]
    seconds: dict[str, np.ndarray]  # float64 [B]; rows of one call share its time equally
    failures: tuple[Failure, ...] = ()
    metrics: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)  # sum, count
    extras: dict[str, list] = dataclasses.field(default_factory=dict)  # [B]; None if not logged
    # By reward [B]: of each completion (end, value) of its steps, or None. The end is in characters
    # of the text, and in tokens once `environments.rewarding` has collected the scores
    steps: dict[str, list] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # of a step, by metric
    # By reward: the number of calls that failed for a whole group and were repeated for each
    # completion, and the first error
    retried: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    @property
    def unknown_B(self) -> np.ndarray:  # noqa: N802
        """True for completions without a reward since one failed, bool [B].

        They leave the mean and the deviation of their groups, and the loss.
        """
        failed = np.zeros(len(self.reward_B), bool)
        for failed_B in self.failed.values():
            failed = failed | failed_B
        return failed & np.isnan(self.reward_B)

    def correct(self, name: str) -> np.ndarray:
        """True for right completions, by a reward that is 1 for a right answer, bool [B]."""
        return self.by_name[name] >= 1.0

    def judged(self, name: str) -> np.ndarray:
        """True for completions to which a reward applies: it gave a number or failed, bool [B]."""
        return ~np.isnan(self.by_name[name]) | self.failed[name]

    def accuracy(self, name: str) -> float:
        """The share of right completions among those to which a reward applies; NaN if none.

        A failed reward counts as wrong, and does not count if it is unknown. An evaluation always
        counts it as wrong, so that all models are measured on all problems.
        """
        known = self.known(name).sum()
        return float(self.correct(name).sum() / known) if known else float("nan")

    def known(self, name: str) -> np.ndarray:
        """True where a reward gave a number, or failed and counts as one, bool [B]."""
        return self.judged(name) & ~(self.failed[name] & self.unknown_B)

    def as_json(self) -> dict[str, Any]:
        """These scores as JSON, with NaN, for `from_json`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["failures"] = [dataclasses.asdict(failure) for failure in self.failures]
        values["reward_B"] = self.reward_B.tolist()
        for name in _ARRAYS:
            values[name] = {n: value_B.tolist() for n, value_B in values[name].items()}
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> Scores:
        """The scores that `as_json` has written, without loss."""
        arrays = {
            name: {n: np.array(value, dtype) for n, value in values[name].items()}
            for name, dtype in _ARRAYS.items()
        }
        return Scores(
            reward_B=np.array(values["reward_B"], np.float32),
            failures=tuple(Failure(**failure) for failure in values["failures"]),
            metrics={n: tuple(sum_count) for n, sum_count in values["metrics"].items()},
            retried={n: tuple(told) for n, told in values["retried"].items()},
            extras=values["extras"],
            steps=values["steps"],
            sums=values["sums"],
            **arrays,
        )

    def broken(self, limit: float) -> dict[str, str]:
        """Messages by name, for rewards that failed for more than this share of the completions."""
        return {
            name: (
                f"{failed_B.sum()} of {len(failed_B)} completions have no reward {name!r}, more "
                f"than rewards.max_failed_share = {limit}. The first: "
                f"{next(f.message for f in self.failures if f.reward == name)}"
            )
            for name, failed_B in self.failed.items()
            if failed_B.mean() > limit
        }

    def num_failed(self, kind: str) -> int:
        """The number of rewards that failed in this way."""
        return sum(failure.kind == kind for failure in self.failures)


def by_function(rewards: Sequence[Reward], scores: Scores) -> np.ndarray:
    """The rewards of each function, float32 [B, R]; NaN where it gave None.

    A failed reward counts as in `combine`, before its weight: an unknown completion has none at
    all.
    """
    columns, unknown_B = [], _unknown(rewards, scores.failed)
    for reward in rewards:
        value_B = scores.by_name[reward.name]
        least = np.fmin.reduce(reward.weight * value_B.astype(np.float64), initial=0.0)
        least = least / reward.weight if reward.weight else 0.0
        value_B = np.where(scores.failed[reward.name], least, value_B)
        columns.append(np.where(unknown_B, np.nan, value_B).astype(np.float32))
    return np.stack(columns, axis=1)


def combine(
    rewards: Sequence[Reward], by_name: dict[str, np.ndarray], failed: dict[str, np.ndarray]
) -> np.ndarray:
    """The weighted sum of the rewards, float32 [B]; NaN if every function gave None.

    A failed reward makes the sum NaN, or counts as the least weighted value of its function in
    other rows, at most 0: see `Scores`. A name in `failed` that is none of the rewards makes it
    NaN.
    """
    total_B, known_B = 0.0, False
    for reward in rewards:
        value_B, failed_B = by_name[reward.name], failed[reward.name]
        share_B = reward.weight * value_B.astype(np.float64)
        least = np.fmin.reduce(share_B, initial=0.0)
        total_B = total_B + np.where(failed_B, least, np.where(np.isnan(share_B), 0.0, share_B))
        known_B = known_B | ~np.isnan(value_B) | failed_B
    known_B = known_B & ~_unknown(rewards, failed)
    return np.where(known_B, total_B, np.nan).astype(np.float32)


def _unknown(rewards: Sequence[Reward], failed: dict[str, np.ndarray]) -> np.ndarray | bool:
    """True for completions of which something failed that counts as unknown, bool [B]."""
    counts = {reward.name for reward in rewards if reward.on_failure == "least"}
    unknown_B = False
    for name, failed_B in failed.items():
        if name not in counts:
            unknown_B = unknown_B | failed_B
    return unknown_B


def left_out(scores: Scores, name: str, why: Mapping[int, str], kind: str = "invalid") -> Scores:
    """The scores with these rows unknown, as a failed reward `name` makes them, with the reasons.

    For what no reward function tells, such as an episode whose environment broke. It does not
    depend on `Reward.on_failure`, and `name` is none of the rewards.
    """
    assert name not in scores.by_name
    rows = len(scores.reward_B)
    failed_B = np.isin(np.arange(rows), list(why))
    failures = (Failure(name, row, kind, message) for row, message in sorted(why.items()))
    return dataclasses.replace(
        scores,
        reward_B=np.where(failed_B, np.float32(np.nan), scores.reward_B),
        by_name=scores.by_name | {name: np.full(rows, np.nan, np.float32)},
        failed=scores.failed | {name: failed_B},
        seconds=scores.seconds | {name: np.zeros(rows)},
        failures=(*scores.failures, *failures),
    )


def join(parts: Sequence[Scores], rewards: Sequence[Reward]) -> Scores:
    """The scores of several batches as one batch, in order; sums are computed over the whole."""
    whole = select([(part, np.arange(len(part.reward_B))) for part in parts])
    if not rewards:
        return whole
    return dataclasses.replace(whole, reward_B=combine(rewards, whole.by_name, whole.failed))


def with_values(
    scores: Scores,
    rewards: Sequence[Reward],
    name: str,
    value_B: Sequence[float | None],
    why: Mapping[int, str] = MappingProxyType({}),
) -> Scores:
    """The scores with one of `rewards` more, in their order; None: no opinion.

    `why`: the rows for which it failed, with the reasons.
    """
    rows = len(scores.reward_B)
    found_B = np.array([np.nan if value is None else value for value in value_B], np.float32)
    by_name = scores.by_name | {name: found_B}
    failed = scores.failed | {name: np.isin(np.arange(rows), list(why))}
    known = [reward for reward in rewards if reward.name in by_name]
    names = [reward.name for reward in known]
    names += [other for other in by_name if other not in names]  # of `left_out`
    pick = lambda values: {name: values[name] for name in names}  # noqa: E731
    failures = (Failure(name, row, "error", message) for row, message in sorted(why.items()))
    return dataclasses.replace(
        scores,
        reward_B=combine(known, by_name, failed),
        by_name=pick(by_name),
        failed=pick(failed),
        seconds=pick(scores.seconds | {name: np.zeros(rows)}),
        failures=(*scores.failures, *failures),
    )


def with_answers(
    scores: Scores, rewards: Sequence[Reward], name: str, answers: Sequence[Answer | None]
) -> Scores:
    """As `with_values`, from calls of the reward for each completion; None: it was not called."""
    value_B = [a.values[0] if a is not None and a.values is not None else None for a in answers]
    why = {
        row: answer.faults.get(0, answer.message)
        for row, answer in enumerate(answers)
        if answer is not None and (answer.values is None or answer.faults)
    }
    metrics = dict(scores.metrics)
    for answer in filter(None, answers):
        for metric, (total, count) in answer.metrics.items():
            before = metrics.get(metric, (0.0, 0))
            metrics[metric] = (before[0] + total, before[1] + count)
    found = with_values(scores, rewards, name, value_B, why)
    return dataclasses.replace(found, metrics=metrics)


def with_models(
    scores: Scores, rewards: Sequence[Reward], by_model: dict[str, np.ndarray], seconds: float
) -> Scores:
    """The scores of reward functions, with those of reward models, in the order of `rewards`.

    `seconds`: that the models took for all. Raises RewardError if a model's reward is not finite.
    """
    for name, value_B in by_model.items():
        if not np.isfinite(value_B).all():
            raise RewardError(
                f"The reward model {name!r} gave {value_B[~np.isfinite(value_B)][0]} to "
                f"{(~np.isfinite(value_B)).sum()} of {len(value_B)} completions. Its weights or "
                "its precision (model.dtype) are at fault."
            )
    rows = len(scores.reward_B)
    by_name, failed, taken = {}, {}, {}
    for name in (reward.name for reward in rewards):
        of_model = name in by_model
        by_name[name] = by_model[name] if of_model else scores.by_name[name]
        failed[name] = np.zeros(rows, bool) if of_model else scores.failed[name]
        share_B = np.full(rows, seconds / len(by_model) / max(rows, 1))
        taken[name] = share_B if of_model else scores.seconds[name]
    for name in [n for n in scores.by_name if n not in by_name]:  # of `left_out`
        by_name[name], failed[name] = scores.by_name[name], scores.failed[name]
        taken[name] = scores.seconds[name]
    total = combine(rewards, by_name, failed)
    return dataclasses.replace(
        scores, reward_B=total, by_name=by_name, failed=failed, seconds=taken
    )


def select(parts: Sequence[tuple[Scores, np.ndarray]]) -> Scores:
    """The scores of some rows of several batches as one batch, in order.

    Unlike in `join`, a failed reward keeps the value that it got in its own batch. Logged values
    and repeated calls are not split by rows: all of each batch's are included.
    """
    names = dict.fromkeys(name for part, _ in parts for name in part.by_name)
    start = np.cumsum([0, *(len(rows) for _, rows in parts)])

    def stack(kind: str, absent: float | bool) -> dict[str, np.ndarray]:
        dtype = _ARRAYS[kind]
        of = lambda p, n: getattr(p, kind).get(n, np.full(len(p.reward_B), absent, dtype))  # noqa: E731
        return {n: np.concatenate([of(p, n)[rows] for p, rows in parts]) for n in names}

    metrics: dict[str, tuple[float, int]] = {}
    retried: dict[str, tuple[int, str]] = {}
    sums: dict[str, float] = {}
    for part, _ in parts:
        for name, total in part.sums.items():
            sums[name] = sums.get(name, 0.0) + total
        for name, (total, count) in part.metrics.items():
            before = metrics.get(name, (0.0, 0))
            metrics[name] = (before[0] + total, before[1] + count)
        for name, (count, message) in part.retried.items():
            before = retried.get(name, (0, message))
            retried[name] = (before[0] + count, before[1])

    def by_row(kind: str) -> dict[str, list]:
        of = [(getattr(part, kind), rows) for part, rows in parts]
        columns = dict.fromkeys(name for values, _ in of for name in values)
        return {
            name: [values[name][r] if name in values else None for values, rows in of for r in rows]
            for name in columns
        }

    return Scores(
        reward_B=np.concatenate([part.reward_B[rows] for part, rows in parts]),
        by_name=stack("by_name", np.nan),
        failed=stack("failed", False),
        seconds=stack("seconds", 0.0),
        failures=tuple(
            failure
            for at, (part, rows) in zip(start, parts)
            for failure in _at(part.failures, rows, int(at))
        ),
        metrics=metrics,
        sums=sums,
        extras=by_row("extras"),
        steps=by_row("steps"),
        retried=retried,
    )


def _at(failures: Sequence[Failure], rows: np.ndarray, start: int) -> list[Failure]:
    """The failures of some rows, which then stand in order from `start` on."""
    place = {int(row): start + i for i, row in enumerate(rows)}
    return [
        dataclasses.replace(failure, row=place[failure.row])
        for failure in failures
        if failure.row in place
    ]
