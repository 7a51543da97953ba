"""Chooses the number and size of an update's rows: few sizes to compile, little padding.

A row has a fixed number of places for prompts and for entries, the tokens of their completions.
Empty places are computed too, so the search looks for the size with the fewest empty places. There
are three ways to place groups: whole; in parts, if a large group would leave no room beside it; or
poured into row after row, each group continued in the next row when one is full. Each part of a
group computes the prompt once more. If a loss reads whole groups, as of pairs, they stay whole, and
a row always has room for one. A program takes any number of rows up to a limit, but each row size
is compiled separately. So a run keeps its sizes until a better size would have saved the work of
two updates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.learner import bins

_PARTS = (1, 2, 3, 4, 6, 8)  # a group may take 1/n of a row's room before it is divided
_LANE_COST = 1 / 8  # of a place in an attention lane; a token of a row costs 1
_ROW_COST = 1 / 32  # of each row, per token of the largest: reading weights, adding gradients
_ROWS = 4  # capacity of a program, at least; unused rows cost nothing
_MOST_LANES = 4  # lane places per token of the largest row; more take too much memory
_TIE = 0.02  # relative difference of cost below which sizes count as equal
_FREE_WASTE = 0.05  # excess over the best size that never triggers a recompile
_RECOMPILE_AT = 2.0  # accumulated excess, in updates, that triggers a recompile
_RECOMPILE_AT_TOKENS = 100_000  # the same in tokens, at least: compiling takes seconds everywhere


class Unit(NamedTuple):
    """A group, or a part of one, that is placed in one row."""

    prompt: int
    completions: list[int]
    entries: int


class Size(NamedTuple):
    """The shape for which a program is compiled; each row is on one device."""

    tokens: int  # padded length of completions
    prompts: int  # in a row
    entries: int  # in a row
    lanes: int  # of a prompt; 0: attention needs none
    rows: int  # at most, on a device


Rows = tuple[list[list[Unit]], list[list[list[int]]]]  # (units_S, rows_S), as in `Filled`


class Filled(NamedTuple):
    """The rows of one update."""

    size: Size
    units_S: list[list[Unit]]  # of each data shard
    rows_S: list[list[list[int]]]  # indices of units by row; equally many rows in all shards


@dataclasses.dataclass(frozen=True)
class PackingProblem:
    """The completions of an update, and the limits of its rows."""

    entries_SPG: np.ndarray
    groups_P: np.ndarray  # the prompts to pack, in each shard
    prompt_tokens: int  # padded length of prompts
    tokens: int  # padded length of completions
    at_once: int  # most tokens of a row with prompts; a single completion may exceed it
    devices: int  # of a shard, with one row each
    multiple: int  # a row's tokens are rounded up to it
    share_lanes: bool  # whether completions share lanes
    whole: bool = False  # whether each group must be in one row
    in_lanes: bool = True  # whether attention needs lanes

    @property
    def width(self) -> int:
        """Places of a lane: the entries of the longest completion."""
        return max(self.tokens - 1, 1)

    @property
    def largest(self) -> int:
        """Tokens of the largest row: at least one completion fits, or one group."""
        completions = self.entries_SPG.shape[2] if self.whole else 1
        return max(self.at_once, self.prompt_tokens + completions * self.width)

    @functools.cached_property
    def strategies(self) -> list[_WholeGroups | _SplitAcrossRows]:
        """The ways to divide the groups: whole if possible, in ever smaller parts, and poured."""
        if self.whole:
            return [_WholeGroups.of(self, self.largest - self.prompt_tokens)]
        longest = int(self.entries_SPG[:, self.groups_P].max())
        found: dict[tuple[int, ...], _WholeGroups] = {}
        for parts in _PARTS:
            room = (self.largest - self.prompt_tokens) // parts
            if room >= max(longest, 1):
                cut = _WholeGroups.of(self, room)
                found.setdefault(tuple(map(len, cut.units_S)), cut)
        whole = next(iter(found.values()))
        num_groups = -(-len(self.groups_P) // self.devices)
        split = _SplitAcrossRows(whole.lanes, longest, num_groups, whole.entries)
        return [*found.values(), split]

    def most_lanes(self, units_S: Iterable[list[Unit]]) -> int:
        """The largest number of lanes of a prompt; 0 for rows without lanes."""
        if not self.in_lanes:
            return 0
        return max(
            len(self.lanes_of(self.entries_SPG[s, u.prompt], u.completions))
            for s, units in enumerate(units_S)
            for u in units
        )

    def allows(self, size: Size) -> bool:
        """Whether a size from earlier in the run, perhaps on another mesh, is still valid."""
        tokens = size.prompts * self.prompt_tokens + size.entries
        fits = tokens < self.largest + self.multiple and tokens % self.multiple == 0
        return fits and size.tokens == self.tokens and (size.lanes > 0) == self.in_lanes

    def lanes_of(self, entries_G: np.ndarray, completions: list[int]) -> list[list[int]]:
        """Completions that share a lane; without lanes, all that follow each other."""
        if not self.in_lanes:
            return [completions]
        if self.share_lanes:
            return bins.fill(entries_G, completions, self.width)
        return [[g] for g in completions]


class _WholeGroups(NamedTuple):
    """One way to divide the groups, and what rows need for it."""

    units_S: list[list[Unit]]
    lanes: int  # of a prompt, at most
    heaviest: int  # entries of a unit
    units: int  # of a device, at least
    entries: int  # of a device, at least

    def rows(self, work: PackingProblem, size: Size, number: int) -> Rows | None:
        """The units in `number` rows on each device; None if `spread` cannot place them."""
        rows_S = []
        for units in self.units_S:
            rows = bins.spread([u.entries for u in units], number * work.devices, size.prompts)
            if any(sum(units[i].entries for i in row) > size.entries for row in rows):
                return None
            rows_S.append(rows)
        return self.units_S, rows_S

    @staticmethod
    def of(work: PackingProblem, room: int) -> _WholeGroups:
        units_S = [
            [unit for p in work.groups_P for unit in _units(int(p), entries_PG[p], room)]
            for entries_PG in work.entries_SPG
        ]
        totals = [sum(u.entries for u in units) for units in units_S]
        return _WholeGroups(
            units_S,
            work.most_lanes(units_S),
            max(u.entries for units in units_S for u in units),
            -(-max(map(len, units_S)) // work.devices),
            -(-max(totals) // work.devices),
        )


class _SplitAcrossRows(NamedTuple):
    """Groups split across rows: like `_WholeGroups`, but the size of rows decides the units."""

    lanes: int
    heaviest: int  # entries of a completion
    units: int
    entries: int

    def rows(self, work: PackingProblem, size: Size, number: int) -> Rows | None:
        """The groups in as many rows as they need; None if they need more lanes than `size` has."""
        units_S, rows_S = zip(
            *(_pour(entries_PG, work.groups_P, size) for entries_PG in work.entries_SPG)
        )
        if work.most_lanes(units_S) > size.lanes:
            return None
        count = max(map(len, rows_S))
        count += -count % work.devices
        return list(units_S), [rows + [[] for _ in range(count - len(rows))] for rows in rows_S]


class _Choice(NamedTuple):
    """A size for one way to divide, with a lower bound of its cost."""

    bound: float
    number: int
    row_cost: float
    size: Size
    way: _WholeGroups | _SplitAcrossRows


class _Found(NamedTuple):
    cost: float
    number: int
    size: Size
    units_S: list[list[Unit]]
    rows_S: list[list[list[int]]]

    @property
    def filled(self) -> Filled:
        return Filled(self.size, self.units_S, self.rows_S)


class CompiledSizes:
    """The row sizes for which one program of a run is compiled.

    The next choice depends on lengths and on earlier choices. So checkpoints keep this, and a
    resumed run sums in the same order.
    """

    def __init__(self):
        self._used: list[Size] = []
        self._wasted = 0.0  # excess work since the last size was added, in updates

    def as_json(self) -> dict[str, Any]:
        return {"used": [list(size) for size in self._used], "wasted": self._wasted}

    def restore(self, kept: dict[str, Any] | None) -> None:
        """Restores the output of `as_json`; None: begins again."""
        kept = kept or {"used": [], "wasted": 0.0}
        self._used = [Size(*size) for size in kept["used"]]
        self._wasted = kept["wasted"]

    def fill(self, work: PackingProblem) -> Filled:
        """The rows of an update, of a size in use or of the best size, which is then in use too."""
        best = _best(work)
        known = _cheapest(work, [size for size in self._used if work.allows(size)])
        if known is not None:
            wasted = max(known.cost / best.cost - 1 - _FREE_WASTE, 0.0)
            if self._wasted + wasted <= max(_RECOMPILE_AT, _RECOMPILE_AT_TOKENS / best.cost):
                self._wasted += wasted
                return known.filled
        self._used.append(best.size)
        self._wasted = 0.0
        return best.filled


def _best(work: PackingProblem) -> _Found:
    """The cheapest rows over all sizes; among equal ones, the largest rows."""
    choices = sorted(_choices(work), key=lambda choice: choice.bound)
    found: list[_Found] = []
    least = float("inf")
    for choice in choices:
        if choice.bound > least * (1 + _TIE):
            break
        one = _filled(work, choice, least * (1 + _TIE))
        if one is not None:
            least = min(least, one.cost)
            found.append(one)
    best = min(
        (one for one in found if one.cost <= least * (1 + _TIE)),
        key=lambda one: (
            -one.size.prompts * work.prompt_tokens - one.size.entries,
            one.size[1:],
            len(one.units_S[0]),
        ),
    )
    rows = max(1 << (best.number * 3 // 2 - 1).bit_length(), _ROWS)
    return best._replace(size=best.size._replace(rows=rows))


def _cheapest(work: PackingProblem, sizes: list[Size]) -> _Found | None:
    """The cheapest rows of some sizes; None if the completions fit in none of them."""
    best = None
    for size in sizes:
        for way in work.strategies:
            if way.heaviest <= size.entries and way.lanes <= size.lanes:
                limit = float("inf") if best is None else best.cost
                best = _filled(work, _choice(work, size, way), limit, size.rows) or best
    return best


def _filled(
    work: PackingProblem, choice: _Choice, limit: float, most: int | None = None
) -> _Found | None:
    """The fewest rows that hold the units within the cost `limit` and `most` rows a device."""
    number = choice.number
    fits = lambda number: number * choice.row_cost <= limit and number <= (most or number)  # noqa: E731
    while fits(number):
        rows = choice.way.rows(work, choice.size, number)
        if rows is not None:
            number = len(rows[1][0]) // work.devices
            cost = number * choice.row_cost
            return _Found(cost, number, choice.size, *rows) if fits(number) else None
        if isinstance(choice.way, _SplitAcrossRows):
            return None
        number += 1
    return None


def _choices(work: PackingProblem) -> Iterator[_Choice]:
    """All sizes to compare: up to the largest, in eighths of it and of its halves."""
    group = work.entries_SPG.shape[2]
    for way in work.strategies:
        lanes = min(1 << (way.lanes - 1).bit_length(), group) if work.in_lanes else 0
        for prompts in _counts(way.units):
            places = prompts * (lanes or group) * work.width
            if prompts > 1 and lanes and places > _MOST_LANES * work.largest:
                break
            for tokens in _eighths(work.largest):
                entries = min(tokens - prompts * work.prompt_tokens, places)
                if entries < max(way.heaviest, 1):
                    break
                entries += -(prompts * work.prompt_tokens + entries) % work.multiple
                yield _choice(work, Size(work.tokens, prompts, entries, lanes, 0), way)


def _choice(work: PackingProblem, size: Size, way: _WholeGroups | _SplitAcrossRows) -> _Choice:
    places = size.prompts * size.lanes * work.width
    tokens = size.prompts * work.prompt_tokens + size.entries
    row_cost = tokens + _LANE_COST * places + _ROW_COST * work.largest
    number = max(-(-way.units // size.prompts), -(-way.entries // size.entries))
    return _Choice(number * row_cost, number, row_cost, size, way)


def _counts(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to the first that is at least `most`."""
    count = 1
    while True:
        yield count
        if count >= most:
            return
        power = 1 << (count.bit_length() - 1)
        between = count == power and count > 1
        count = count * 3 // 2 if between else power * 2


def _eighths(largest: int) -> Iterator[int]:
    """Four sizes from the largest down to its half, and so on; multiples of 16 from 256 on."""
    while largest:
        for eighths in (8, 7, 6, 5):
            size = largest * eighths // 8
            yield size - size % 16 if eighths < 8 and size >= 256 else size
        largest //= 2


def _pour(
    entries_PG: np.ndarray, groups_P: np.ndarray, size: Size
) -> tuple[list[Unit], list[list[int]]]:
    """Rows of that size, filled group by group with the completions that fit, longest first."""
    units: list[Unit] = []
    rows: list[list[int]] = [[]]
    room = size.entries
    for p in groups_P:
        entries_G = entries_PG[p]
        waiting = sorted(range(len(entries_G)), key=lambda g: (-entries_G[g], g))
        while waiting:
            taken, rest, had = [], [], room
            for g in waiting:
                fits = entries_G[g] <= room and len(rows[-1]) < size.prompts
                (taken if fits else rest).append(g)
                room -= int(entries_G[g]) * fits
            if taken:
                rows[-1].append(len(units))
                units.append(Unit(int(p), sorted(taken), had - room))
            if rest:
                rows.append([])
                room = size.entries
            waiting = rest
    return units, rows


def _units(prompt: int, entries_G: np.ndarray, room: int) -> list[Unit]:
    """The group whole, or in parts if it has more entries than `room`.

    As few parts as possible, of similar size.
    """
    total = int(entries_G.sum())
    if total <= room:
        return [Unit(prompt, list(range(len(entries_G))), total)]
    parts = bins.fill(entries_G, range(len(entries_G)), room)
    alike = bins.spread(entries_G.tolist(), len(parts), len(entries_G))
    if all(entries_G[part].sum() <= room for part in alike):
        parts = alike
    return [Unit(prompt, part, int(entries_G[part].sum())) for part in parts]


def balance(length_PG: np.ndarray, shards: int, minibatches: int = 1) -> np.ndarray:
    """An order of prompts that gives data shards about equally many tokens, int [P].

    Shards are consecutive parts of that order. Prompt p stays in its minibatch, p % minibatches.
    """
    entries_P = (length_PG - 1).sum(1)
    order_P = np.empty(len(entries_P), int)
    for i in range(minibatches):
        members = np.arange(len(entries_P))[i::minibatches]
        share = len(members) // shards
        for s, part in enumerate(bins.spread(entries_P[members].tolist(), shards, share)):
            begin = s * share * minibatches + i
            order_P[begin : begin + share * minibatches : minibatches] = members[sorted(part)]
    return order_P
