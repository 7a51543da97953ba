"""The picture of a run, drawn from its metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grpo_jax.run.append_log import read_jsonl

if TYPE_CHECKING:  # else imported by what draws: a run begins half a second earlier
    from matplotlib.axes import Axes

_COLORS = ("#2f6fb0", "#d1603d", "#3c8d5a", "#8461a8", "#b58a1f", "#5b6770")
_INK, _GRID = "#2b2f36", "#e3e6ea"
_PHASES = ("rollout", "reward", "update", "evaluation", "checkpoint")

Series = tuple[np.ndarray, np.ndarray]  # steps and values, without the steps not measured


# --- The picture ----------------------------------------------------------------------------------


def curves(workdir: str | Path) -> Path:
    """Draws `curves.png` (1500 x 900 pixels) in `workdir` from its metrics.jsonl; returns its path.

    Raw values are faint, their running means strong. Raises ValueError when there are no metrics.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    workdir = Path(workdir)
    by_step = _by_step(workdir / "metrics.jsonl")
    figure = Figure(figsize=(15, 9), dpi=100, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(2, 3).ravel()
    panels = (_reward, _each_reward, _completions, _entropy_and_kl, _gradient, _seconds)
    for ax, draw in zip(axes, panels):
        _style(ax)
        right = draw(ax, by_step)
        _legend(ax, right)
        if not ax.has_data() and not (right and right.has_data()):
            ax.set(xticks=[], yticks=[])
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#9aa1ab")
        ax.set_xlabel("step", color=_INK)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    path = workdir / "curves.png"
    unfinished = path.with_name("curves.png.new")  # a viewer never meets half a picture
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)
    return path


def mean_throughput(workdir: str | Path) -> float:
    """Tokens sampled per second of sampling, over the run; 0 where nothing was measured.

    Of the steps that are logged: those that were rolled back have neither tokens nor seconds.
    """
    tokens = seconds = 0.0
    for row in _by_step(Path(workdir) / "metrics.jsonl").values():
        rate, rollout_s = row.get("throughput/generated_tokens_per_s"), row.get("time/rollout_s")
        if rate is not None and rollout_s is not None:
            tokens, seconds = tokens + rate * rollout_s, seconds + rollout_s
    return tokens / seconds if seconds else 0.0


def _by_step(path: Path) -> dict[int, dict[str, float | None]]:
    """Metrics of each step, in order; lines of one step are joined."""
    if not path.is_file():
        raise ValueError(f"There is no {path}. --workdir names the folder of a run.")
    by_step: dict[int, dict[str, float | None]] = {}
    for row in read_jsonl(path):
        by_step.setdefault(row["step"], {}).update(row)
    if not by_step:
        raise ValueError(f"{path} holds no metrics yet; a run writes them after its first step.")
    return dict(sorted(by_step.items()))


def _series(by_step: Mapping[int, Mapping[str, float | None]], name: str) -> Series:
    points = [(s, row[name]) for s, row in by_step.items() if row.get(name) is not None]
    step, value = zip(*points) if points else ((), ())
    return np.array(step, np.int64), np.array(value, np.float64)


def _smooth(value: np.ndarray) -> np.ndarray:
    """Running mean over a window of about 1/12 of the run, centred, shorter at the ends."""
    half = len(value) // 24
    total = np.concatenate([[0.0], np.cumsum(value)])
    low = np.maximum(np.arange(len(value)) - half, 0)
    high = np.minimum(np.arange(len(value)) + half + 1, len(value))
    return (total[high] - total[low]) / (high - low)


def _style(ax: Axes) -> None:
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=_INK, length=0)
    for side in ax.spines.values():
        side.set_color(_GRID)


def _line(ax: Axes, series: Series, color: str, label: str) -> None:
    step, value = series
    if not len(step):
        return
    if len(step) == 1:
        ax.plot(step, value, "o", color=color, label=label)
        return
    ax.plot(step, value, color=color, alpha=0.22, linewidth=1)
    ax.plot(step, _smooth(value), color=color, linewidth=2.2, label=label)


def _right_axis(ax: Axes, label: str) -> Axes:
    right = ax.twinx()
    right.tick_params(colors=_INK, length=0)
    right.set_frame_on(False)
    right.set_ylabel(label, color=_INK)
    return right


def _legend(ax: Axes, right: Axes | None) -> None:
    drawn = [a for a in (ax, right) if a]
    handles = [h for a in drawn for h in a.get_legend_handles_labels()[0]]
    if not handles:
        return
    look = {"handles": handles, "fontsize": 8.5, "labelcolor": _INK, "handlelength": 1.1}
    if sum(len(h.get_label()) + 4 for h in handles) > 72:  # too wide for one row of the panel
        drawn[-1].legend(**look, framealpha=0.85, edgecolor=_GRID)
        return
    row = ax.legend(  # of both axes, between title and curves, where it hides nothing
        **look,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.985),
        ncols=len(handles),
        frameon=False,
        columnspacing=1.0,
        handletextpad=0.5,
    )
    row.set_in_layout(False)  # else a long row would narrow every panel


def _title(ax: Axes, title: str, y_label: str) -> None:
    ax.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold", pad=24)
    ax.set_ylabel(y_label, color=_INK)


def _reward(ax: Axes, by_step: Mapping) -> None:
    _title(ax, "Reward and accuracy", "mean over completions")
    _line(ax, _series(by_step, "reward"), _COLORS[0], "reward")
    _line(ax, _series(by_step, "accuracy"), _COLORS[1], "accuracy")
    step, value = _series(by_step, "eval/accuracy")
    form = "{:.0%} to {:.0%}"
    if not len(step):
        (step, value), form = _series(by_step, "eval/reward"), "{:.3g} to {:.3g}"
    if len(step):
        ax.plot(
            step,
            value,
            "D--",
            color=_COLORS[2],
            linewidth=1.2,
            markersize=7,
            markeredgecolor="white",
            label=f"held out, greedy: {form.format(value[0], value[-1])}",
        )


def _each_reward(ax: Axes, by_step: Mapping) -> Axes:
    _title(ax, "Each reward", "mean over completions")
    prefix = "reward/"
    found = dict.fromkeys(n for row in by_step.values() for n in row if n.startswith(prefix))
    # A spread is written beside its mean; a reward may itself be called ..._std.
    names = [n for n in found if not (n.endswith("_std") and n.removesuffix("_std") in found)]
    for i, name in enumerate(names):
        color = _COLORS[i % len(_COLORS)]
        _line(ax, _series(by_step, name), color, name.removeprefix(prefix))
    right = _right_axis(ax, "share of groups with equal rewards")
    _line(right, _series(by_step, "groups/equal_share"), "#8b929c", "equal groups (right)")
    _as_share(right)
    return right


def _completions(ax: Axes, by_step: Mapping) -> Axes:
    _title(ax, "Completions", "tokens")
    _line(ax, _series(by_step, "completion/length"), _COLORS[0], "length")
    _line(ax, _series(by_step, "completion/stopped_length"), _COLORS[3], "of the stopped")
    right = _right_axis(ax, "share of completions")
    _line(
        right,
        _series(by_step, "completion/truncated_share"),
        _COLORS[1],
        "cut at the limit (right)",
    )
    _as_share(right)
    return right


def _entropy_and_kl(ax: Axes, by_step: Mapping) -> Axes:
    _title(ax, "Policy", "entropy, nats per token")
    _line(ax, _series(by_step, "policy/entropy"), _COLORS[0], "entropy")
    right = _right_axis(ax, "KL to the reference, nats per token")
    _line(right, _series(by_step, "policy/kl"), _COLORS[1], "KL (right)")
    if not right.has_data():
        right.set_axis_off()
    return right


def _gradient(ax: Axes, by_step: Mapping) -> Axes:
    _title(ax, "Updates", "gradient norm before clipping")
    _line(ax, _series(by_step, "policy/grad_norm"), _COLORS[0], "gradient norm")
    right = _right_axis(ax, "share of tokens with a clipped ratio")
    for i, side in enumerate(("low", "high"), start=1):
        share = _series(by_step, f"policy/clip_{side}_share")
        _line(right, share, _COLORS[i], f"clipped {side} (right)")
    _as_share(right)
    return right


def _seconds(ax: Axes, by_step: Mapping) -> None:
    _title(ax, "Time", "seconds per step")
    step = np.array(list(by_step), np.int64)
    seconds, labels = [], []
    for phase in _PHASES:
        found_at, value = _series(by_step, f"time/{phase}_s")
        if len(found_at):
            full = np.zeros(len(step))
            full[np.searchsorted(step, found_at)] = value
            seconds.append(full)
            labels.append(phase)
    if seconds:
        colors = [_COLORS[_PHASES.index(label)] for label in labels]
        ax.stackplot(step, seconds, labels=labels, colors=colors, alpha=0.85, step="mid")
        # The first step compiles; the rest would be a line at the bottom beside it.
        total = np.sum(seconds, axis=0)
        ax.set_ylim(0, 1.25 * np.quantile(total, 0.98))


def _as_share(ax: Axes) -> None:
    """Percent from 0 to at least 1 %, on the right; nothing where nothing was measured."""
    from matplotlib.ticker import PercentFormatter

    if not ax.has_data():
        ax.set_axis_off()
        return
    ax.set_ylim(0, max(0.01, 1.15 * max(line.get_ydata().max() for line in ax.lines)))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
