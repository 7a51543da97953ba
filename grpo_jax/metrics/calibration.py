"""How well a reward model's probabilities hold: of pairs, by bins of what it says.

A reward model says that the first of two completions is preferred with the probability
sigmoid(difference of their rewards). Of the pairs to which it gives a probability near p, a share
of p should have the preference that it says. Pairs are counted once for each order, so that the
picture has both halves.

    N pairs     K bins
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from grpo_jax.metrics import curves


class Bins(NamedTuple):
    """Pairs by the probability that the model gives to one order of them."""

    said_K: np.ndarray  # mean probability; NaN for a bin without pairs
    held_K: np.ndarray  # share of these pairs in which the first is the preferred one; NaN as well
    count_K: np.ndarray  # pairs

    @property
    def error(self) -> float:
        """The mean distance of both, over pairs: the expected calibration error.

        Guo et al. 2017, arXiv:1706.04599, equation 3.
        """
        gap_K = np.abs(np.nan_to_num(self.said_K - self.held_K))
        return float((self.count_K * gap_K).sum() / self.count_K.sum())


def bins(difference_N: np.ndarray, number: int = 10) -> Bins:
    """Bins of equal width, from the differences of the rewards, preferred minus other."""
    both = np.concatenate([difference_N, -difference_N]).astype(np.float64)
    said = 1 / (1 + np.exp(-both))
    held = np.repeat([1.0, 0.0], len(difference_N))
    place = np.minimum((said * number).astype(int), number - 1)
    count_K = np.bincount(place, minlength=number)
    mean = lambda x: np.where(  # noqa: E731
        count_K > 0, np.bincount(place, x, number) / np.maximum(count_K, 1), np.nan
    )
    return Bins(mean(said), mean(held), count_K)


def draw(difference_N: np.ndarray, path: Path) -> Path:
    """Draws `bins` as a picture at `path` and returns that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, width = bins(difference_N), 1 / 10
    figure = Figure(figsize=(5.5, 5.5), dpi=120)
    FigureCanvasAgg(figure)
    ax, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    ax.plot([0, 1], [0, 1], "--", color=curves.COLORS[6], linewidth=1)
    ax.plot(found.said_K, found.held_K, "o-", color=curves.COLORS[0])
    accuracy = (difference_N > 0).mean()
    ax.set_title(
        f"{len(difference_N):,} pairs, accuracy {accuracy:.1%}, error {found.error:.3f}",
        fontsize=10,
    )
    ax.set_ylabel("share in which it was preferred")
    below.bar((np.arange(10) + 0.5) * width, found.count_K, width * 0.9, color=curves.COLORS[5])
    below.set_ylabel("pairs, both orders")
    below.set_xlabel("probability by the reward model that the first is preferred")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    figure.tight_layout()
    figure.savefig(path)
    return path
