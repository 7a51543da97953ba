"""Draws the curves of a run, or of several runs for comparison, from their metrics.

Raw values are faint, their running means strong. A line has a gap at a step without a value.
A dark picture is the same one in other colours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grpo_jax.metrics import history as history_lib
from grpo_jax.metrics.dark import darken
from grpo_jax.metrics.history import History, Series
from grpo_jax.metrics.panels import COMPILING, JOINED, OTHER, PHASES, Line, Panel, panels

if TYPE_CHECKING:  # otherwise imported when drawing: saves half a second at a run's start
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color Universal Design": distinct also with colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D5560")
_DASHES = ("-", "--", ":", "-.")  # for more lines than colours, and for several lines of one run
_INK, _PALE, _GRID, _REST = "#2b2f36", "#717a86", "#e3e6ea", "#c3c9d1"
_OF_PART = dict(zip((*PHASES.values(), OTHER), (*COLORS[:5], _REST)))
_SIZE, _DPI = (12.5, 7.5), 120  # 1500 x 900 pixels
_LEGEND_WIDTH = 54  # characters above a panel; a column's mark takes seven
_LEGEND_ROW, _MAX_ROWS = 12.0, 3  # points


# --- The pictures ---------------------------------------------------------------------------------


def curves(workdir: str | Path, *, dark: bool = False) -> Path:
    """Draws `curves.png`, 1500 x 900 pixels, and `curves.svg` in `workdir`; returns the former.

    With `dark` they are called `curves_dark`. Raises ValueError if there are no metrics.
    """
    history = history_lib.read(workdir)
    figure = _figure()
    figure.text(0.012, 0.967, history.name, color=_INK, fontsize=13, fontweight="bold", va="center")
    figure.text(0.988, 0.968, history.told(), color=_PALE, fontsize=9, va="center", ha="right")
    shown = panels(history)
    axes = _axes(figure, len(shown))
    for ax, panel in zip(axes, shown):
        _frame(ax, panel, *_reach([panel]))
        if panel.stack:
            _draw_stack(ax, panel.stack)
        else:
            _draw_alone(ax, panel)
        _draw_limit(ax, panel.limit)
    _same_steps(axes, [history])
    _finish(figure, axes, [(panel.title, panel.unit) for panel in shown], top=0.42)
    return _save(figure, Path(workdir) / f"curves{'_dark' * dark}.png", dark)


def compare(
    workdirs: Sequence[str | Path], names: Sequence[str], out: Path, *, dark: bool = False
) -> Path:
    """Draws the runs of several folders into the same panels, with these names; returns `out`.

    Writes an SVG beside it. Raises ValueError if a folder has no metrics.
    """
    from matplotlib.lines import Line2D

    histories = [history_lib.read(workdir) for workdir in workdirs]
    runs = [panels(history) for history in histories]
    titles = list(dict.fromkeys(panel.title for run in runs for panel in run))
    by_title = [[panel for run in runs for panel in run if panel.title == t] for t in titles]
    columns = max(1, min(len(names), int(140 / (max(map(len, names)) + 6))))
    figure, rows = _figure(), -(-len(names) // columns)
    handles = [Line2D([], [], **_look(i), linewidth=2.6, label=n) for i, n in enumerate(names)]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.004, 0.995), ncols=columns,
        frameon=False, fontsize=10.5, labelcolor=_INK, handlelength=1.6,
    )  # fmt: skip
    axes = _axes(figure, len(titles))
    for ax, title, group in zip(axes, titles, by_title):
        _frame(ax, next((p for p in group if p.has_data), group[0]), *_reach(group))
        for i, run in enumerate(runs):
            for panel in (p for p in run if p.title == title):
                _draw_beside(ax, panel, i)
        limits = {panel.limit for panel in group}
        _draw_limit(ax, limits.pop() if len(limits) == 1 else None)
    _same_steps(axes, histories)
    units = [next((p.unit for p in group if p.has_data), "") for group in by_title]
    _finish(figure, axes, list(zip(titles, units)), top=0.2 + 0.22 * rows)
    return _save(figure, out, dark)


def mean_throughput(workdir: str | Path) -> float:
    """Tokens sampled per second of sampling, over the run; 0 without measurements."""
    return history_lib.mean_throughput(history_lib.read(workdir))


# --- The figure -----------------------------------------------------------------------------------


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=_SIZE, dpi=_DPI, facecolor="white")


def _axes(figure: Figure, number: int) -> list[Axes]:
    columns = min(4, -(-number // 2)) if number > 3 else max(number, 1)
    rows = -(-max(number, 1) // columns)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes[number:]:
        ax.set_axis_off()
    return axes[:number]


def _finish(figure: Figure, axes: Sequence[Axes], titles: Sequence[tuple[str, str]], top: float):
    """Titles, units and legends above the panels, `top` inches below the figure's upper end.

    They are placed by hand: matplotlib's layouts draw everything twice, with widths that differ
    between runs.
    """
    if not axes:
        figure.text(0.5, 0.5, "nothing is measured yet", ha="center", color=_PALE)
        return
    num_rows, num_columns = axes[0].get_subplotspec().get_gridspec().get_geometry()
    legends = [_legend_shape(ax, title, num_columns) for ax, (title, _) in zip(axes, titles)]
    above = [0] * num_rows  # rows of the legends above each row of panels
    for i, (rows, _) in enumerate(legends):
        above[i // num_columns] = max(above[i // num_columns], rows if rows <= _MAX_ROWS else 0)
    for i, (ax, (title, unit), shape) in enumerate(zip(axes, titles, legends)):
        pad = 7 + _LEGEND_ROW * above[i // num_columns]
        ax.set_title(title, loc="left", color=_INK, fontsize=10.5, fontweight="bold", pad=pad)
        ax.set_title(unit, loc="right", color=_PALE, fontsize=8, pad=pad)
        _legend(ax, *shape, pad)
    width, height = _SIZE
    head, foot = 0.36, 0.42  # inches of a title, and of the text below a panel
    inches = [head + _LEGEND_ROW / 72 * rows for rows in above]
    gap = foot + max(inches[1:], default=0)
    each = (height - top - inches[0] - foot - gap * (num_rows - 1)) / num_rows
    left, between = 0.55, 0.6
    across = (width - left - 0.15 - between * (num_columns - 1)) / num_columns
    figure.subplots_adjust(
        left=left / width, right=1 - 0.15 / width, wspace=between / across, hspace=gap / each,
        top=1 - (top + inches[0]) / height, bottom=foot / height,
    )  # fmt: skip


def _save(figure: Figure, path: Path, dark: bool) -> Path:
    import matplotlib

    if dark:
        darken(figure, {COLORS[0]: "#4da6e8", COLORS[6]: "#a9b3c0", _INK: "#dde2e9",
                        _PALE: "#97a1ae", _GRID: "#343b45", _REST: "#5d6672"})  # fmt: skip
    for kind in ("svg", "png"):
        target = path.with_suffix(f".{kind}")
        unfinished = target.with_name(f"{target.name}.new")  # a viewer never sees half a picture
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grpo_jax"}):
            metadata = {"Date": None} if kind == "svg" else None  # a fixed file for a run
            figure.savefig(unfinished, format=kind, metadata=metadata)
        os.replace(unfinished, target)
    return path.with_suffix(".png")


# --- A panel --------------------------------------------------------------------------------------


def _reach(group: Sequence[Panel]) -> tuple[float, float]:
    """The least and the largest value of a panel's lines, over all its runs."""
    values = [v for p in group for v in [line.series[1] for line in p.lines]]
    values += [p.band[2] for p in group if p.band]
    known = np.concatenate([v[np.isfinite(v)] for v in values] or [np.zeros(0)])
    return (known.min(), known.max()) if len(known) else (0.0, 0.0)


def frame(ax: Axes) -> None:
    """The look of all pictures: a pale grid and frame, small ticks."""
    ax.tick_params(colors=_INK, length=0, labelsize=8)
    for side in ax.spines.values():
        side.set_color(_GRID)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def _frame(ax: Axes, panel: Panel, least: float, largest: float) -> None:
    """Titles, grid and axes of a panel."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    frame(ax)
    if not panel.has_data:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.text(0.5, 0.5, panel.absent, transform=ax.transAxes, ha="center", fontsize=8.5,
                color=_PALE)  # fmt: skip
        return
    ax.set_xlabel("step", color=_INK, fontsize=8.5, labelpad=2)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if panel.is_share:
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif panel.from_zero and least >= 0:
        ax.set_ylim(0, 1.06 * largest or 1.0)


def _same_steps(axes: Sequence[Axes], histories: Sequence[History]) -> None:
    first = min(min(history.by_step) for history in histories)
    last = max(max(history.by_step) for history in histories)
    margin = max(0.02 * (last - first), 0.6)
    for ax in axes:
        if len(ax.get_xticks()):
            ax.set_xlim(first - margin, last + margin)


def _draw_limit(ax: Axes, limit: tuple[str, float] | None) -> None:
    """Draws a limit of the config, unless it would press the curves to the bottom."""
    if not limit or not ax.has_data():
        return
    (name, value), top = limit, ax.get_ylim()[1]
    look, label = {"color": _INK, "linewidth": 1, "linestyle": (0, (4, 3))}, f"{name} {value:,g}"
    if value <= 1.6 * top:
        ax.axhline(value, **look, label=label)
        ax.set_ylim(0, max(top, 1.06 * value))
    else:
        ax.plot([], [], **look, label=f"{label} (out of view)")


def _draw_alone(ax: Axes, panel: Panel) -> None:
    if panel.band:
        step, low, high = panel.band
        ax.fill_between(step, low, high, color=COLORS[0], alpha=0.12, linewidth=0,
                        label="shortest to longest")  # fmt: skip
    for i, line in enumerate(panel.lines):
        order = 3 - i / 10  # of overlapping lines the first is on top
        _draw_line(ax, line, line.label, is_share=panel.is_share, zorder=order, **_look(i))


def _draw_beside(ax: Axes, panel: Panel, number: int) -> None:
    """Draws a panel's compared lines, in the colour of run `number`."""
    look = _look(number)
    for i, line in enumerate(line for line in panel.lines if line.is_compared):
        several = sum(other.is_compared for other in panel.lines) > 1
        style = _DASHES[i % len(_DASHES)] if several else look["linestyle"]
        _draw_line(ax, line, "", color=look["color"], linestyle=style)
        label = line.label.partition(JOINED)[0]
        if label not in ax.get_legend_handles_labels()[1]:
            ax.plot([], [], color=_INK, linestyle=style, linewidth=1.8, label=label)


def _look(number: int) -> dict[str, str]:
    """Colour and dashes of line `number`."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": _DASHES[number // len(COLORS) % len(_DASHES)],
    }


def _draw_line(
    ax: Axes,
    line: Line,
    label: str,
    *,
    color: str,
    linestyle: str,
    is_share: bool = False,
    zorder: float = 2,
) -> None:
    step, value = line.series
    if line.as_points:
        known = value[np.isfinite(value)]
        if label and len(known) > 1:
            first, last = known[0], known[-1]
            told = (f"{first:.3g}", f"{last:.3g}")
            if is_share:
                told = (f"{100 * first:.1f}", f"{last:.1%}")
            label += " " + " \N{RIGHTWARDS ARROW} ".join(told)
        ax.plot(step, value, marker="o", color=color, linestyle=linestyle, linewidth=1.2,
                markersize=5, markeredgecolor="white", markeredgewidth=0.7, label=label,
                zorder=zorder)  # fmt: skip
        return
    smooth = _smooth(value)
    if len(step) > 1 and not np.array_equal(smooth, value, equal_nan=True):
        alpha = 0.22 * min(1.0, 300 / len(step)) ** 0.5  # many steps would fill an area
        ax.plot(step, value, color=color, alpha=alpha, linewidth=0.9)
    ax.plot(step, smooth, color=color, linestyle=linestyle, linewidth=1.9, label=label)
    alone = _alone(value)
    ax.plot(step[alone], smooth[alone], "o", color=color, markersize=4)


def _smooth(value: np.ndarray) -> np.ndarray:
    """Running mean over a window of about 1/12 of the run, centred, shorter at the ends.

    It ignores unknown values, and is NaN where the value in the middle is unknown.
    """
    half, known = len(value) // 24, np.isfinite(value)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, value, 0.0))])
    number = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(value)) - half, 0)
    high = np.minimum(np.arange(len(value)) + half + 1, len(value))
    mean = (total[high] - total[low]) / np.maximum(number[high] - number[low], 1)
    return np.where(known, mean, np.nan)


def _alone(value: np.ndarray) -> np.ndarray:
    """True for known values between unknown ones: a line alone would not show them."""
    known = np.concatenate([[False], np.isfinite(value), [False]])
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _draw_stack(ax: Axes, stack: dict[str, Series]) -> None:
    """Draws the seconds of a step's parts as a stack, with compiling hatched."""
    step, compiling = stack[COMPILING]
    edges = np.append(step - 0.5, step[-1] + 0.5)
    below = np.zeros(len(step))
    for label, color in _OF_PART.items():
        if stack[label][1].any():
            above = below + stack[label][1]
            ax.stairs(above, edges, baseline=below, fill=True, color=color, label=label)
            below = above
    if compiling.any():
        ax.stairs(below + compiling, edges, baseline=below, fill=True, facecolor="white",
                  edgecolor=_INK, linewidth=0, hatch="//////", label=COMPILING)  # fmt: skip
    _cut_peaks(ax, step, below + compiling)


def _cut_peaks(ax: Axes, step: np.ndarray, total: np.ndarray) -> None:
    """Cuts single steps that take much longer than most, and writes how long each takes."""
    top = top_s = total.max()
    usual = np.quantile(total[total > 0], 0.9)
    if top > 3 * usual:
        top = 2 * usual
    ax.set_ylim(0, 1.12 * top)
    cut = np.flatnonzero(total > 1.12 * top)
    ax.plot(step[cut], np.full(len(cut), 1.09 * top), "^", color=_INK, markersize=4)
    near, groups = 0.3 * (step[-1] - step[0] + 1), []
    for i in cut:  # numbers of adjacent steps would overlap
        if groups and step[i] - step[groups[-1][0]] < near:
            groups[-1].append(i)
        else:
            groups.append([i])
    look = {"color": _INK, "fontsize": 7.5, "va": "center"}
    if len(cut) > 6:
        text = f"cut: up to {_seconds(top_s)} s"
        ax.text(0.98, 0.91, text, transform=ax.transAxes, ha="right", **look)
        return
    for group in groups:
        text = ", ".join(_seconds(total[i]) for i in group) + " s"
        is_late = step[group[0]] > (step[0] + step[-1]) / 2
        ax.annotate(
            text, (step[group[0 if is_late else -1]], 1.09 * top), textcoords="offset points",
            xytext=(-5 if is_late else 5, 0), ha="right" if is_late else "left", **look,
        )  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def _legend_shape(ax: Axes, title: str, num_columns: int) -> tuple[int, int]:
    """Rows and columns of a panel's legend, with as few rows as possible."""
    labels = ax.get_legend_handles_labels()[1]
    if not labels or (len(labels) == 1 and labels[0].lower() in title.lower()):
        return 0, 0  # the title suffices
    columns = len(labels)
    while columns > 1 and _width(labels, columns) > _LEGEND_WIDTH * 4 // num_columns:
        columns -= 1
    return -(-len(labels) // columns), columns


def _width(labels: list[str], columns: int) -> int:
    """Characters of the widest row of a legend, as matplotlib fills its columns."""
    return sum(7 + max(map(len, column)) for column in np.array_split(labels, columns))


def _legend(ax: Axes, rows: int, columns: int, pad: float) -> None:
    """Draws the legend between title and curves; one with many rows is drawn over the curves."""
    from matplotlib.transforms import ScaledTranslation

    look = {"labelcolor": _INK, "handlelength": 1.3}
    if rows > _MAX_ROWS:
        ax.legend(**look, fontsize=6.5, framealpha=0.85, edgecolor=_GRID)
    elif rows:
        up = ScaledTranslation(0, (pad + 1.5) / 72, ax.figure.dpi_scale_trans)
        ax.legend(
            **look, fontsize=7.8, loc="upper left", bbox_to_anchor=(-0.03, 1.0),
            bbox_transform=ax.transAxes + up, ncols=columns, frameon=False, columnspacing=1.0,
            handletextpad=0.5, labelspacing=0.25, borderpad=0.3,
        )  # fmt: skip
