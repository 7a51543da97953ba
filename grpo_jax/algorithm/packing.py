"""Microbatches without padding: the completions of some groups, token after token in one row.

Everything in the network that works token by token sees the row: its prompts, each once for its
group, and then the completions' tokens with nothing between them. Attention alone needs to know
which tokens belong together: for it a prompt has some lanes of equal width, each holding one
completion or several. Where each token stands is two arrays of integers, made on the host from the
completions' lengths. An entry of the row predicts the token that it is numbered by and reads the
one before it; a completion's first token is predicted by the prompt, so a completion of n tokens
takes n - 1 entries. Where a row has as many entries as its lanes have places, as with completions
of like length, an entry is a place: nothing moves between them, and the shapes alone tell.

Microbatches of one update are equally large, so that one program runs them all, and sizes come in
steps, so that few are compiled in a run.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """N microbatches of each data shard S; each has a row on every one of the shard's devices D.

    A microbatch has M prompts, the same number on each device. A group of more tokens than a
    microbatch may hold stands in several, each with the prompt and some of its completions.
    """

    groups_SNM: np.ndarray  # int32: which of the shard's prompts; -1 for none, to fill a shape
    own_SNMG: np.ndarray  # bool: completions of that group that this microbatch has
    token_SNDX: np.ndarray  # int32: (m * G + g) * C + c, m counted on the device; -1: no token
    lane_SNMLT: np.ndarray  # int32: which entry of its row stands here; -1: none

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.groups_SNM, self.own_SNMG, self.token_SNDX, self.lane_SNMLT


class _Unit(NamedTuple):
    """A group or a part of one, which stays together."""

    prompt: int
    completions: list[int]
    entries: int


def pack(
    length_SPG: np.ndarray,
    groups_P: np.ndarray,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    at_once: int,
    devices: int = 1,
    multiple: int = 1,
    share_lanes: bool = True,
) -> Microbatches:
    """The groups of numbers `groups_P` of each shard in microbatches of at most `at_once` tokens.

    That is the size of a row, prompts (padded to `prompt_tokens`) included; a single completion
    always fits. It is then rounded up to a `multiple`. Without `share_lanes` each completion has a
    lane of its own. A function of the lengths alone, so that a
    resumed run sums in the same order.
    """
    num_shards, _, group = length_SPG.shape
    width = max(completion_tokens - 1, 1)
    room = max(at_once - prompt_tokens, width)
    units_S = [
        [unit for p in groups_P for unit in _units(int(p), length_PG[p] - 1, room)]
        for length_PG in length_SPG
    ]
    rows_S, size, entries = _rows(units_S, devices, prompt_tokens, group * width, at_once)
    entries += -(size * prompt_tokens + entries) % multiple
    count = len(rows_S[0]) // devices
    lanes_SU = [
        [
            _fill(length_SPG[s, u.prompt] - 1, u.completions, width)
            if share_lanes
            else [[g] for g in u.completions]
            for u in units
        ]
        for s, units in enumerate(units_S)
    ]
    lanes = max(len(lanes) for lanes_U in lanes_SU for lanes in lanes_U)
    num_lanes = min(1 << (lanes - 1).bit_length(), group)  # a power of two
    if entries == size * group * width:
        num_lanes = group
    whole = entries == size * num_lanes * width
    groups = np.full((num_shards, count, devices, size), -1, np.int32)
    own = np.zeros((*groups.shape, group), bool)
    token = np.full((num_shards, count, devices, entries), -1, np.int32)
    lane = np.full((*groups.shape, num_lanes, width), -1, np.int32)
    for s, n, d in np.ndindex(groups.shape[:3]):
        at = 0
        for j, i in enumerate(rows_S[s][n * devices + d]):
            unit = units_S[s][i]
            groups[s, n, d, j] = unit.prompt
            own[s, n, d, j, unit.completions] = True
            for k, completions in enumerate(lanes_SU[s][i]):
                begin = at = (j * num_lanes + k) * width if whole else at
                for g in completions:
                    more = int(length_SPG[s, unit.prompt, g]) - 1
                    first = (j * group + g) * completion_tokens + 1
                    token[s, n, d, at : at + more] = np.arange(first, first + more)
                    at += more
                lane[s, n, d, j, k, : at - begin] = np.arange(begin, at)
    return Microbatches(
        groups.reshape(num_shards, count, -1),
        own.reshape(num_shards, count, -1, group),
        token,
        lane.reshape(num_shards, count, devices * size, num_lanes, width),
    )


def _units(prompt: int, entries_G: np.ndarray, room: int) -> list[_Unit]:
    """The group whole, or in parts where it has more entries than `room`.

    As few parts as have room, of like size: rows are as large as the largest needs.
    """
    parts = _fill(entries_G, range(len(entries_G)), room)
    alike = _spread(entries_G.tolist(), len(parts), len(entries_G))
    if all(entries_G[part].sum() <= room for part in alike):
        parts = alike
    return [_Unit(prompt, part, int(entries_G[part].sum())) for part in parts]


def _rows(
    units_S: list[list[_Unit]], devices: int, prompt_tokens: int, group_entries: int, at_once: int
) -> tuple[list[list[list[int]]], int, int]:
    """Which units stand in which rows of each shard, the most of them in a row, and its entries.

    As few rows as `at_once` allows, alike for all shards.
    """
    most = -(-max(map(len, units_S)) // devices)
    weights_S = [sorted(u.entries for u in units) for units in units_S]
    for total in _steps(max(map(sum, weights_S)) // devices):
        for count in (*(n for n in _COUNTS if n < most), most):
            size = -(-most // count)
            entries = min(-(-total // count), size * group_entries)
            # A row has the heaviest unit, and another no fewer than so many of the lightest.
            least = max(
                max(sum(w[-1:]), sum(w[: -(-len(w) // (count * devices))])) for w in weights_S
            )
            if least <= entries and size * prompt_tokens + entries <= at_once:
                break
        rows_S = [_spread([u.entries for u in units], count * devices, size) for units in units_S]
        if all(
            sum(units[i].entries for i in row) <= entries
            for units, rows in zip(units_S, rows_S)
            for row in rows
        ):
            return rows_S, size, entries
    raise AssertionError


def _spread(weights: list[int], bins: int, most: int) -> list[list[int]]:
    """Indices in so many bins of like weight, at most `most` in each.

    The heaviest first, each into the lightest bin that is not full.
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    open_bins = [(0, b) for b in range(bins)]
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        weight, b = heapq.heappop(open_bins)
        filled[b].append(i)
        if len(filled[b]) < most:
            heapq.heappush(open_bins, (weight + weights[i], b))
    return filled


def _steps(entries: int) -> Iterator[int]:
    """Sizes from `entries` on, four between powers of two, without end."""
    step = lambda n: max(16, 1 << max(n.bit_length() - 3, 0))  # noqa: E731
    size = -(-entries // step(entries)) * step(entries)
    while True:
        yield size
        size += step(size)


def _fill(entries_G: np.ndarray, completions: Iterable[int], width: int) -> list[list[int]]:
    """Completions in bins of `width` entries, the longest first, each into the first with room."""
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
