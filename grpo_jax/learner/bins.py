"""Divides numbers into bins of about equal sums."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np


def spread(weights: list[int], bins: int, most: int) -> list[list[int]]:
    """Indices in `bins` bins of similar weight, at most `most` in each.

    Greedy: the heaviest first, each into the lightest bin that is not full.
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    open_bins = [(0, b) for b in range(bins)]
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        weight, b = heapq.heappop(open_bins)
        filled[b].append(i)
        if len(filled[b]) < most:
            heapq.heappush(open_bins, (weight + weights[i], b))
    return filled


def fill(entries_G: np.ndarray, completions: Iterable[int], width: int) -> list[list[int]]:
    """Completions in bins of `width` entries; first fit, the longest first."""
    completions = list(completions)
    if sum(int(entries_G[g]) for g in completions) <= width:
        return [sorted(completions, key=lambda g: (-entries_G[g], g))]
    bins: list[list[int]] = []
    room: list[int] = []
    for g in sorted(completions, key=lambda g: (-entries_G[g], g)):
        need = int(entries_G[g])
        b = next((i for i, free in enumerate(room) if free >= need), len(room))
        if b == len(room):
            bins.append([])
            room.append(width)
        bins[b].append(g)
        room[b] -= need
    return bins
