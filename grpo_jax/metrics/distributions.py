"""A picture of rewards that were tried: how each is distributed, and how they go together.

M rewards, and further columns such as length
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from grpo_jax.metrics import curves

_COLUMNS, _MOST = 3, 11  # panels beside each other, and histograms at all
_BINS = 30


def draw(value: Mapping[str, np.ndarray], correlation_MM: np.ndarray, path: Path) -> Path:
    """Draws histograms of `value` [B] by name, and their correlations, at `path`; returns that.

    `correlation_MM`: of all of `value`, in its order; NaN where there is none. The ending of `path`
    says the kind of picture. Values that are NaN are counted in a panel's title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(value)[:_MOST]
    columns = min(_COLUMNS, len(shown) + 1)
    rows = -(-(len(shown) + 1) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, (ax, name) in enumerate(zip(axes, shown)):
        _histogram(ax, name, value[name], curves.COLORS[i % len(curves.COLORS)])
    _heat_map(figure, axes[len(shown)], list(value), correlation_MM)
    for ax in axes[len(shown) + 1 :]:
        ax.set_axis_off()
    figure.tight_layout()
    figure.savefig(path)
    return path


def _histogram(ax, name: str, value_B: np.ndarray, color: str) -> None:
    known = value_B[np.isfinite(value_B)]
    curves.frame(ax)
    if len(known):
        levels = np.unique(known)
        if len(levels) <= 12:  # bars at the values themselves
            counts = [(known == level).sum() for level in levels]
            width = 0.6 * np.diff(levels).min() if len(levels) > 1 else 0.6
            ax.bar(levels, counts, width, color=color)
        else:
            ax.hist(known, bins=_BINS, color=color)
        ax.axvline(known.mean(), color=curves.COLORS[6], linewidth=1, linestyle="--")
    title = f"{name}: {known.mean():.3g} ± {known.std():.3g}" if len(known) else name
    if unknown := len(value_B) - len(known):
        title += f", {unknown:,} without"
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_ylabel("rows", fontsize=8)


def _heat_map(figure, ax, names: list[str], correlation_MM: np.ndarray) -> None:
    picture = ax.imshow(correlation_MM, vmin=-1, vmax=1, cmap="RdBu_r")
    places = range(len(names))
    ax.set_xticks(places, names, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(places, names, fontsize=7)
    for i in places:
        for j in places:
            if np.isfinite(correlation_MM[i, j]) and len(names) <= 12:
                ax.text(j, i, f"{correlation_MM[i, j]:.2f}", ha="center", va="center", fontsize=6)
    ax.set_title("correlations", fontsize=9, loc="left")
    figure.colorbar(picture, ax=ax, shrink=0.8)
