"""A picture in the colours of a dark page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER = {"#ffffff": "#16191e"}
_ASPECTS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def darken(figure: Figure, colors: Mapping[str, str]) -> None:
    """Replaces colours wherever the figure has them, and white by nearly black.

    Opacity is kept. Colours that `colors` does not name stay.
    """
    from matplotlib.colors import to_rgb

    told = {tuple(to_rgb(old)): to_rgb(new) for old, new in (_PAPER | dict(colors)).items()}
    figure.draw_without_rendering()  # makes the ticks
    for artist in figure.findobj():
        for aspect in _ASPECTS:
            read = getattr(artist, f"get_{aspect}", None)
            write = getattr(artist, f"set_{aspect}", None)
            if read is None or write is None:
                continue
            found = _replaced(read(), told)
            if found is not None:
                write(found)


def _replaced(color: object, told: Mapping[tuple, tuple]) -> object:
    """A colour, or several of a collection, as they become; None if none of them is named."""
    from matplotlib.colors import is_color_like, to_rgba

    if isinstance(color, np.ndarray) and color.ndim == 2:  # those of a collection
        several = [_replaced(tuple(one), told) for one in color]
        if all(new is None for new in several):
            return None
        return [tuple(old) if new is None else new for new, old in zip(several, color)]
    if not is_color_like(color):  # such as "auto"
        return None
    red, green, blue, opacity = to_rgba(color)
    new = told.get((red, green, blue))
    return None if new is None else (*new, opacity)
