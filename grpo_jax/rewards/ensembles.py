"""Ensembles: one reward from several others of the same completions, by arithmetic.

    c.rewards.names = (
        "sentiment as helpful",
        "clean_language as safe",
        "ensemble:gate(of='helpful', where='safe', at_least=1) as helpful_if_safe",
    )
    c.rewards.weights = (0.0, 0.0, 1.0)

An entry is "ensemble:FORM(arguments)", and its members are entries before it, of any kind, by their
names in metrics. They are rewards like others, computed, logged and failing by themselves; a weight
of 0 leaves them out of the sum. So an ensemble is computed once they are known, from the
completions of the step alone.

A member that failed makes the ensemble unknown, unless `rewards.on_failure` lets it count as the
worst value of the step. A member that gave None is left out; without any there is None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards import kinds, registry
from grpo_jax.rewards import scores as scores_lib
from grpo_jax.rewards.registry import Reward
from grpo_jax.rewards.scores import Failure, Scores

Values = dict[str, np.ndarray]  # float64 [B] by member; NaN: None

_LEAST_DEVIATION = 1e-4  # equal values that differ by rounding alone
_STEP = "step"


# --- The forms ------------------------------------------------------------------------------------
# Each gets its members' values, stacked in the order of `of` where that is a list.


def _sum(value_MB: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    weight_M1 = np.ones(len(value_MB)) if weights is None else np.asarray(weights, np.float64)
    return np.where(np.isnan(value_MB), 0.0, weight_M1[:, None] * value_MB).sum(0)


def _product(value_MB: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(value_MB), 1.0, value_MB).prod(0)


def _minimum(value_MB: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(value_MB), np.inf, value_MB).min(0)


def _lower(value_MB: np.ndarray, k: float = 1.0) -> np.ndarray:
    known_MB = ~np.isnan(value_MB)
    count_B = np.maximum(known_MB.sum(0), 1)
    mean_B = np.where(known_MB, value_MB, 0.0).sum(0) / count_B
    square_B = np.where(known_MB, value_MB - mean_B, 0.0) ** 2
    return mean_B - k * np.sqrt(square_B.sum(0) / count_B)


_OF_LISTS: dict[str, Callable[..., np.ndarray]] = {
    "sum": _sum,
    "product": _product,
    "minimum": _minimum,
    "lower": _lower,
}


# Their arguments, as the config writes them. Each returns the names of the members it reads.


def sum_(
    of: Sequence[str],
    weights: Sequence[float] | None = None,
    scale: str | Mapping[str, Any] | None = None,
) -> None:
    """The sum of `of`, with `weights`."""
    _check_list("of", of)
    _check_scale(of, scale)
    if weights is not None and (len(weights) != len(of) or not all(map(_is_number, weights))):
        raise ValueError(f"weights = {weights!r} must be {len(of)} numbers, one for each of `of`")


def product(of: Sequence[str]) -> None:
    """The product of `of`, for members from 0 to 1: each must be high."""
    _check_list("of", of)


def minimum(of: Sequence[str], scale: str | Mapping[str, Any] | None = None) -> None:
    """The least of `of`: what the most critical member says."""
    _check_list("of", of)
    _check_scale(of, scale)


def lower(of: Sequence[str], k: float = 1.0, scale: str | Mapping[str, Any] | None = None) -> None:
    """The mean of `of` minus `k` times their deviation: where members disagree, it is low."""
    _check_list("of", of)
    _check_scale(of, scale)
    if not _is_number(k) or k < 0:
        raise ValueError(f"k = {k!r} must be a number, 0 or more")


def gate(
    of: str, where: str | Sequence[str], at_least: float, otherwise: float | None = 0.0
) -> None:
    """The value of `of` where each of `where` is at least `at_least`, else `otherwise`."""
    _check_list("of", [of])
    _check_list("where", [where] if isinstance(where, str) else where)
    for name, value in (("at_least", at_least), ("otherwise", otherwise)):
        if not _is_number(value):
            raise ValueError(f"{name} = {value!r} must be a number")


def penalty(of: str, by: str, times: float = 1.0, above: float = 0.0) -> None:
    """The value of `of` minus `times` what `by` has `above` a threshold."""
    _check_list("of", [of])
    _check_list("by", [by])
    for name, value in (("times", times), ("above", above)):
        if not _is_number(value):
            raise ValueError(f"{name} = {value!r} must be a number")


FORMS: dict[str, Callable[..., None]] = {
    "sum": sum_,
    "product": product,
    "minimum": minimum,
    "lower": lower,
    "gate": gate,
    "penalty": penalty,
}


# --- Reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """What an entry says."""

    form: str  # of FORMS
    arguments: Mapping[str, Any]

    @property
    def members(self) -> list[str]:
        """The names of the rewards that it reads, each once."""
        found: list[str] = []
        for name in ("of", "where", "by"):
            value = self.arguments.get(name, ())
            found += [value] if isinstance(value, str) else value
        return list(dict.fromkeys(found))

    def value(self, values: Values) -> np.ndarray:
        """The ensemble's value from its members', float64 [B]; NaN where no member has one."""
        how = dict(self.arguments)
        of = how.pop("of")
        if self.form in _OF_LISTS:
            value_MB = np.stack([values[name] for name in of])
            if (scale := how.pop("scale", None)) is not None:
                value_MB = np.stack([_scaled(v, n, scale) for n, v in zip(of, value_MB)])
            return np.where(
                np.isnan(value_MB).all(0), np.nan, _OF_LISTS[self.form](value_MB, **how)
            )
        if self.form == "gate":
            where = [how["where"]] if isinstance(how["where"], str) else how["where"]
            shut_B = np.zeros(len(values[of]), bool)
            for name in where:  # a condition that does not apply shuts nothing
                shut_B |= values[name] < how["at_least"]
            known_B = ~np.isnan(values[of])
            return np.where(known_B & shut_B, how.get("otherwise", 0.0), values[of])
        beyond_B = np.nan_to_num(values[how["by"]], nan=-np.inf) - how.get("above", 0.0)
        return values[of] - how.get("times", 1.0) * np.maximum(beyond_B, 0.0)


def read(after: str) -> Ensemble:
    """The ensemble of an entry without its prefix. Raises ValueError, naming rewards.names."""
    form, arguments = registry.split_call(after)
    entry = f"ensemble:{after}"
    if form not in FORMS:
        raise ValueError(
            f"rewards.names: {entry!r}: {form!r} is no form of an ensemble, which are "
            f"{', '.join(FORMS)}."
        )
    try:
        FORMS[form](**(arguments or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rewards.names: {entry!r} cannot be read: {str(error).replace('sum_()', 'sum()')}."
        ) from error
    return Ensemble(form, arguments or {})


def function(after: str) -> Callable:
    """For `kinds.KINDS`: refuses an entry that cannot be read; no worker computes it."""
    read(after)
    return kinds.of_no_worker(after)


def of_rewards(rewards: Sequence[Reward]) -> dict[str, Ensemble]:
    """The ensembles among the rewards, by name, in their order."""
    return {r.name: read(kinds.split(r.spec)[1]) for r in rewards if r.runs == kinds.OTHERS}


def members(rewards: Sequence[Reward]) -> list[str]:
    """The rewards that some ensemble reads, and that are none themselves, each once."""
    ensembles = of_rewards(rewards)
    found = [name for ensemble in ensembles.values() for name in ensemble.members]
    return [name for name in dict.fromkeys(found) if name not in ensembles]


def refuse(rewards: Sequence[Reward]) -> None:
    """Raises ValueError if an ensemble names a member that is not a reward before it."""
    before: list[str] = []
    for reward in rewards:
        if reward.runs == kinds.OTHERS:
            for name in read(kinds.split(reward.spec)[1]).members:
                if name not in before:
                    raise ValueError(
                        f"rewards.names: {reward.spec!r} names the member {name!r}, which is none "
                        f"of the rewards before it: {', '.join(before) or 'there are none'}. Name "
                        "it before, with weight 0 if it counts within the ensemble alone."
                    )
        before.append(reward.name)


# --- Computing ------------------------------------------------------------------------------------


def add(scores: Scores, rewards: Sequence[Reward]) -> Scores:
    """The scores with those of the ensembles among the rewards, in the order of `rewards`.

    The scores have all other rewards. Sums, and what `scale` "step" measures, are of all rows.
    """
    ensembles = of_rewards(rewards)
    if not ensembles:
        return scores
    by_name, failed = dict(scores.by_name), dict(scores.failed)
    seconds, failures = dict(scores.seconds), list(scores.failures)
    lenient = {reward.name for reward in rewards if reward.on_failure == "least"}
    for name, ensemble in ensembles.items():
        values = {m: by_name[m].astype(np.float64) for m in ensemble.members}
        failed_B = np.any([failed[m] for m in ensemble.members], axis=0)
        if name in lenient:
            by = ensemble.arguments.get("by")
            values = {m: _counted(v, failed[m], most=m == by) for m, v in values.items()}
            failed_B = np.zeros(len(failed_B), bool)
        value_B = np.where(failed_B, np.nan, ensemble.value(values))
        by_name[name], failed[name] = value_B.astype(np.float32), failed_B
        seconds[name] = np.zeros(len(value_B))
        failures += _failures(name, ensemble, failed, failed_B)
    order = [r.name for r in rewards] + [n for n in by_name if n not in {r.name for r in rewards}]
    in_order = lambda found: {n: found[n] for n in order}  # noqa: E731
    by_name, failed = in_order(by_name), in_order(failed)
    return dataclasses.replace(
        scores,
        reward_B=scores_lib.combine(rewards, by_name, failed),
        by_name=by_name,
        failed=failed,
        seconds=in_order(seconds),
        failures=tuple(failures),
    )


def _counted(value_B: np.ndarray, failed_B: np.ndarray, *, most: bool) -> np.ndarray:
    """A member's values; where it failed, its worst in the step, on the other side of 0 at best.

    The worst is the least, or for what a penalty is computed from, the `most`.
    """
    worst = (np.fmax if most else np.fmin).reduce(value_B, initial=0.0)
    return np.where(failed_B, worst, value_B)


def _failures(
    name: str, ensemble: Ensemble, failed: Mapping[str, np.ndarray], failed_B: np.ndarray
) -> list[Failure]:
    found = []
    for row in np.flatnonzero(failed_B):
        member = next(m for m in ensemble.members if failed[m][row])
        told = f"The ensemble {name!r} has no value, since its member {member!r} failed."
        found.append(Failure(name, int(row), "member", told))
    return found


def _scaled(value_B: np.ndarray, name: str, scale: str | Mapping[str, Any]) -> np.ndarray:
    """A member in deviations from its mean: those of the step, or those that are given."""
    if scale == _STEP:
        known_B = value_B[~np.isnan(value_B)]
        mean, deviation = (known_B.mean(), known_B.std()) if len(known_B) else (0.0, 0.0)
    else:
        mean, deviation = scale[name]
    if deviation <= _LEAST_DEVIATION:
        return np.where(np.isnan(value_B), np.nan, 0.0)
    return (value_B - mean) / deviation


# --- Checks of arguments --------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    return fine and math.isfinite(value)


def _check_list(name: str, names: Any) -> None:
    fine = isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names)
    if not fine or not names or len({*names}) < len(names):
        raise ValueError(f"{name} = {names!r} must name rewards, each once")


def _check_scale(of: Sequence[str], scale: Any) -> None:
    if scale is None or scale == _STEP:
        return
    fine = isinstance(scale, dict) and scale.keys() == {*of}
    if not fine or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_number, pair))
        for pair in scale.values()
    ):
        raise ValueError(
            f'scale = {scale!r} must be "step", or give the mean and the deviation of each member, '
            f"as python -m grpo_jax.score prints them: {{{of[0]!r}: (0.4, 0.2), ...}}"
        )
