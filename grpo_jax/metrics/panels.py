"""The data of a run's curves: eight panels with one axis each.

A run on given completions has the panels of its loss in place of those of GRPO that it does not
measure. Equal lines of a panel are drawn once, under both names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from grpo_jax.metrics.history import History, Series

PHASES = {  # of a step: the name in metrics, and in the picture
    "rollout": "rollout",
    "reward": "rewards",
    "update": "update",
    "evaluation": "evaluation",
    "checkpoint": "checkpoint",
}
OTHER, COMPILING = "other", "compiling"
JOINED = " = "  # between the names of lines that are equal
_LABEL = 28  # characters of a name


class Line(NamedTuple):
    """One metric over the steps."""

    label: str
    series: Series
    is_compared: bool = False  # also drawn when runs are compared
    as_points: bool = False  # measured at some steps only: each value is marked


class Panel(NamedTuple):
    """Lines with a common axis."""

    title: str
    unit: str
    lines: list[Line]
    is_share: bool = False  # 0 to 100 %
    from_zero: bool = False
    limit: tuple[str, float] | None = None  # a limit of the config: its name, and its value
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # steps, least and most
    stack: dict[str, Series] | None = None  # seconds of each part of a step, for a single run
    absent: str = "not measured"  # text if there is nothing to draw

    @property
    def has_data(self) -> bool:
        return bool(self.lines or self.stack)


def panels(history: History) -> list[Panel]:
    """A run's panels, in order; for a run on given completions only those with data."""
    first = [
        _of_given(history, section, *panel)
        for section, own in _GIVEN.items()
        if history.names(f"{section}/loss")
        for panel in own
    ]
    draw = (_reward, _held_out, _length, _shares, _kl, _entropy, _gradient, _time)
    found = [*first, *(panel(history) for panel in draw)]
    return [p for p in found if p.has_data] if first else found


# --- One panel each -------------------------------------------------------------------------------


# Of runs on given completions, by section: title, unit, {metric: label}, whether it is a share.
# A metric's value on held-out rows is called eval_ and the metric.
_TOLD_APART = "pairs told apart"
_GIVEN = {
    "sft": (
        ("Loss", "nats per token", {"loss": "loss", "nll": "cross-entropy"}, False),
        ("Likeliest tokens", "share", {"token_accuracy": "likeliest token"}, True),
        ("Entropy", "nats per token", {"entropy": "entropy"}, False),
    ),
    "preference": (
        ("Loss", "", {"loss": "loss"}, False),
        ("Preferences", "share", {"reward_accuracy": _TOLD_APART}, True),
        (
            "Implicit reward",
            "beta x log-ratio",
            {"reward_chosen": "chosen", "reward_rejected": "rejected", "reward_margin": "margin"},
            False,
        ),
        (
            "Log-probability",
            "nats per completion",
            {"logp_chosen": "chosen", "logp_rejected": "rejected"},
            False,
        ),
        ("Cross-entropy", "nats per token", {"nll": "chosen"}, False),
        ("Entropy", "nats per token", {"entropy": "entropy"}, False),
    ),
    "reward_model": (
        ("Loss", "nats", {"loss": "loss"}, False),
        ("Preferences", "share", {"accuracy": _TOLD_APART}, True),
        ("Reward", "", {"margin": "chosen - rejected", "mean": "mean", "std": "deviation"}, False),
    ),
}


def _of_given(
    history: History, section: str, title: str, unit: str, names: dict[str, str], is_share: bool
) -> Panel:
    """A panel of a run on given completions; the first of its metrics is compared between runs.

    The value of held-out rows stands beside a metric that is alone, and beside a loss.
    """
    told = {f"{section}/{name}": label for name, label in names.items()}
    first = next(iter(names))
    compared = {f"{section}/{first}", f"{section}/eval_{first}"}
    lines = _lines(history, told, compared)
    if len(names) == 1 or first == "loss":
        held_out = {f"{section}/eval_{first}": "held out"}
        lines += _lines(history, held_out, compared, among=f"{section}/eval_")
    return Panel(title, unit, lines, is_share=is_share)


def _reward(history: History) -> Panel:
    names = {"reward": "reward", **_each(history, "reward/"), "accuracy": "accuracy"}
    return Panel("Reward", "mean over completions", _lines(history, names, {"reward"}))


def _held_out(history: History) -> Panel:
    """Shares of right answers; the rewards if no reward measures accuracy."""
    shares = [n for n in history.names("eval/") if "@" in n]
    shares = {n: n.removeprefix("eval/") for n in ("eval/accuracy", *shares)}
    lines = _lines(history, shares, {"eval/accuracy"}, among="eval/")
    if lines:
        return Panel("Held-out problems", "share solved", lines, is_share=True)
    names = {"eval/reward": "reward", **_each(history, "eval/reward/")}
    lines = _lines(history, names, {"eval/reward"}, among="eval/")
    return Panel("Held-out problems", "mean reward", lines, absent="no evaluation")


def _length(history: History) -> Panel:
    names = {"completion/length": "mean", "completion/stopped_length": "of the stopped"}
    if _equal(*map(history.series, names)):  # all completions stopped
        del names["completion/stopped_length"]
    low, high = (history.series(f"completion/length_{end}") for end in ("min", "max"))
    band = (*low, high[1]) if len(low[0]) and np.array_equal(low[0], high[0]) else None
    limit = history.options.get("rollout.max_tokens")
    return Panel(
        "Completion length",
        "tokens",
        _lines(history, names, {"completion/length"}),
        from_zero=True,
        limit=("limit", limit) if limit else None,
        band=band,
    )


def _shares(history: History) -> Panel:
    names = {
        "groups/equal_share": "equal groups",
        "completion/truncated_share": "cut at the limit",
        "policy/clip_low_share": "ratio clipped low",
        "policy/clip_high_share": "ratio clipped high",
    }
    for name in list(names)[2:]:  # always 0 with one update per rollout
        if not np.nansum(history.series(name)[1]):
            del names[name]
    compared = {"groups/equal_share", "completion/truncated_share"}
    return Panel("Shares", "", _lines(history, names, compared), is_share=True)


def _kl(history: History) -> Panel:
    names = {"policy/kl": "KL", "policy/drift_mean": "drift within a rollout"}
    if not np.nansum(history.series("policy/drift_mean")[1]):
        del names["policy/drift_mean"]
    without = history.options.get("algorithm.kl_coef") == 0
    return Panel(
        "KL to the reference",
        "nats per token",
        _lines(history, names, {"policy/kl"}),
        from_zero=True,
        absent="no reference (algorithm.kl_coef = 0)" if without else "not measured",
    )


def _entropy(history: History) -> Panel:
    lines = _lines(history, {"policy/entropy": "entropy"}, {"policy/entropy"})
    return Panel("Entropy", "nats per token", lines, from_zero=True)


def _gradient(history: History) -> Panel:
    lines = _lines(history, {"policy/grad_norm": "before clipping"}, {"policy/grad_norm"})
    limit = history.options.get("optim.max_grad_norm")
    limit = ("clipped above", limit) if limit else None
    return Panel("Gradient norm", "", lines, from_zero=True, limit=limit)


def _time(history: History) -> Panel:
    stack = _seconds(history)
    step, whole_s = history.series("time/step_s")
    lines = []
    if stack and len(step):
        parts = [stack[p][1] for p in stack if p not in (COMPILING, PHASES["evaluation"])]
        at = (step - stack[OTHER][0][0]).astype(int)
        spent_s = np.where(np.isfinite(whole_s), np.sum(parts, axis=0)[at], np.nan)
        lines = [Line("without compiling and evaluation", (step, spent_s), is_compared=True)]
    return Panel("Time", "seconds per step", lines, from_zero=True, stack=stack)


# --- Parts of them --------------------------------------------------------------------------------


def _each(history: History, prefix: str) -> dict[str, str]:
    """The metrics of single rewards, without their standard deviations (..._std).

    A reward may itself be called ..._std.
    """
    found = history.names(prefix)
    names = [n for n in found if not (n.endswith("_std") and n.removesuffix("_std") in found)]
    return {n: n.removeprefix(prefix) for n in names}


def _lines(
    history: History, names: dict[str, str], compared: set[str], *, among: str = ""
) -> list[Line]:
    """A line for each measured metric, with its label; equal lines are joined."""
    lines: list[Line] = []
    for name, label in names.items():
        series, is_compared = history.series(name, among=among), name in compared
        if not len(series[0]):
            continue
        line = Line(_short(label), series, is_compared, as_points=bool(among))
        same = next((i for i, other in enumerate(lines) if _equal(other.series, series)), None)
        if same is None:
            lines.append(line)
        else:
            other = lines[same]
            label = f"{other.label}{JOINED}{line.label}"
            is_compared = other.is_compared or line.is_compared
            lines[same] = other._replace(label=label, is_compared=is_compared)
    return lines


def _short(label: str) -> str:
    """A label, cut in its middle, so that names with the same beginning stay different."""
    if len(label) <= _LABEL:
        return label
    half = _LABEL // 2 - 1
    return f"{label[:half]}\N{HORIZONTAL ELLIPSIS}{label[-half:]}"


def _equal(a: Series, b: Series) -> bool:
    return np.array_equal(a[0], b[0]) and np.allclose(a[1], b[1], 1e-5, 1e-9, equal_nan=True)


def _seconds(history: History) -> dict[str, Series] | None:
    """Seconds of each part of a step, for all steps from the first to the last; 0 if unknown.

    Only the total compile time of a step is known. It is subtracted from the step's parts in
    proportion to their excess over their median, and beyond that in proportion to their length.
    """
    first, last = min(history.by_step), max(history.by_step)
    step = np.arange(first, last + 1)
    has_line = np.isin(step, list(history.by_step))

    def full(metric: str) -> np.ndarray:
        found, value = np.zeros(len(step)), history.series(f"time/{metric}_s")
        known = np.isfinite(value[1])
        found[value[0][known].astype(int) - first] = value[1][known]
        return found

    parts = {label: full(phase) for phase, label in PHASES.items()}
    named = sum(v for label, v in parts.items() if label != PHASES["checkpoint"])  # between steps
    parts[OTHER] = np.maximum(full("step") - named, 0.0)
    total = sum(parts.values())
    if not total.any():
        return None
    usual = {label: np.median(value[has_line]) for label, value in parts.items()}
    longer = {label: np.maximum(value - usual[label], 0.0) for label, value in parts.items()}
    compiling = np.minimum(full("compile"), total)
    more = sum(longer.values())
    of_longer = np.minimum(compiling, more)
    rest = (compiling - of_longer) / np.maximum(total - of_longer, 1e-9)
    for label, value in parts.items():
        value = value - longer[label] * of_longer / np.maximum(more, 1e-9)
        parts[label] = value * (1 - rest)
    return {label: (step, value) for label, value in (parts | {COMPILING: compiling}).items()}
