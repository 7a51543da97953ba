"""Sizes of rows: little padding whatever the lengths, few sizes in a run, the same on resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grpo_jax.learner import row_sizes
from grpo_jax.learner.row_sizes import CompiledSizes, Filled, PackingProblem, Size

PROMPT, TOKENS, AT_ONCE = 64, 256, 2048


def work(
    length_SPG,
    *,
    tokens=TOKENS,
    at_once=AT_ONCE,
    devices=1,
    multiple=1,
    share_lanes=True,
    whole=False,
    in_lanes=True,
):
    groups_P = np.arange(length_SPG.shape[1])
    entries_SPG = length_SPG - 1
    return PackingProblem(
        entries_SPG, groups_P, PROMPT, tokens, at_once, devices, multiple, share_lanes, whole,
        in_lanes,
    )  # fmt: skip


def lengths(
    seed: int, mean: float = 50, *, prompts: int = 32, spread: float = 0.4, shards: int = 1
):
    """Groups differ in length as problems do, and completions of a group less."""
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0, spread, (shards, prompts, 1))
    length = mean * scale * rng.lognormal(0, spread / 2, (shards, prompts, 8))
    return np.clip(length.round(), 1, TOKENS).astype(np.int32)


def computed(filled: Filled) -> int:
    """Tokens of all rows, prompts included."""
    number = sum(map(len, filled.rows_S))
    return number * (filled.size.prompts * PROMPT + filled.size.entries)


def excess(length_SPG, filled: Filled) -> float:
    """What is computed beside each prompt once and each entry, as a share of those."""
    needed = (length_SPG - 1).sum() + length_SPG[..., 0].size * PROMPT
    return computed(filled) / needed - 1


def check(given: PackingProblem, filled: Filled) -> None:
    """Every unit stands in one row, and every row keeps its size."""
    size = filled.size
    assert len({len(r) for r in filled.rows_S}) == 1
    assert len(filled.rows_S[0]) <= size.rows * given.devices
    assert len(filled.rows_S[0]) % given.devices == 0
    for s, (units, shard_rows) in enumerate(zip(filled.units_S, filled.rows_S, strict=True)):
        assert sorted(i for row in shard_rows for i in row) == list(range(len(units)))
        assert not given.whole or len(units) == len(given.groups_P)
        seen = [(u.prompt, g) for u in units for g in u.completions]
        assert sorted(seen) == [(p, g) for p in given.groups_P for g in range(8)]
        for unit in units:
            entries_G = given.entries_SPG[s, unit.prompt]
            assert unit.entries == entries_G[unit.completions].sum()
            number = len(given.lanes_of(entries_G, unit.completions)) if given.in_lanes else 0
            assert number <= size.lanes
        for row in shard_rows:
            assert len(row) <= size.prompts
            assert sum(units[i].entries for i in row) <= size.entries


@pytest.mark.parametrize("mean", [1, 12, 50, 120, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"at_once": 1},
        {"at_once": 500},
        {"devices": 4},
        {"multiple": 8},
        {"share_lanes": False},
        {"whole": True},
        {"whole": True, "at_once": 500, "devices": 4},
        {"in_lanes": False},
        {"in_lanes": False, "at_once": 500, "devices": 4},
    ],
    ids=str,
)
def test_everything_stands_in_a_row(mean, options):
    for seed, shards in ((0, 1), (1, 2)):
        given = work(lengths(seed, mean, shards=shards), **options)
        sizes = CompiledSizes()
        first = sizes.fill(given)
        check(given, first)
        tokens = first.size.prompts * PROMPT + first.size.entries
        assert tokens % given.multiple == 0
        group = 8 if given.whole else 1
        assert tokens < max(given.at_once, PROMPT + group * (TOKENS - 1)) + given.multiple
        other = work(lengths(seed + 2, mean, shards=shards), **options)
        check(other, sizes.fill(other))


@pytest.mark.parametrize("spread", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("mean", [25, 50, 100])
def test_little_is_padded_however_groups_differ(mean, spread):
    for seed in range(5):
        length_SPG = lengths(seed, mean, spread=spread)
        # A group in parts has its prompt more than once, which is the price of full rows.
        assert excess(length_SPG, CompiledSizes().fill(work(length_SPG))) < 0.3


def test_one_long_group_does_not_make_all_rows_as_long():
    """By hand: 31 groups of 8 x 10 entries take 31 * (64 + 80) tokens, one of 8 x 255 2,104."""
    length_SPG = np.full((1, 32, 8), 11)
    length_SPG[0, 5] = TOKENS
    filled = CompiledSizes().fill(work(length_SPG))
    assert computed(filled) < 1.35 * (31 * (64 + 80) + 2104)


def test_what_a_row_has_no_room_for_goes_on_in_the_next():
    """Groups of 8 x 110 entries: a row of 1,500 tokens holds one whole, and half of another."""
    length_SPG = np.full((1, 16, 8), 101)
    length_SPG[0, :, 1::2] = 121
    filled = CompiledSizes().fill(work(length_SPG, tokens=1024, at_once=1500))
    assert filled.size.prompts == 2 and len(filled.rows_S[0]) == 11
    assert excess(length_SPG, filled) < 0.12


def test_full_completions_leave_nothing_empty():
    """Two groups of 8 x 255 entries and two prompts are a row of 4,208 tokens."""
    length_SPG = np.full((1, 32, 8), TOKENS)
    filled = CompiledSizes().fill(work(length_SPG, at_once=2 * (64 + 8 * 255)))
    assert filled.size == Size(TOKENS, 2, 2 * 8 * 255, 8, 32)  # no more rows than 32
    assert len(filled.rows_S[0]) == 16


def test_a_run_has_few_sizes():
    """Lengths vary by chance, grow and shrink; nearly every step finds its programs compiled."""
    sizes, means = CompiledSizes(), [*np.linspace(40, 100, 100), *np.linspace(100, 30, 100)]
    wasted = []
    for step, mean in enumerate(means):
        length_SPG = lengths(step, mean)
        wasted.append(excess(length_SPG, sizes.fill(work(length_SPG))))
    assert len(sizes.as_json()["used"]) <= 8
    alone = [
        excess(lengths(s, m), CompiledSizes().fill(work(lengths(s, m))))
        for s, m in enumerate(means)
    ]
    assert np.mean(wasted) < np.mean(alone) + 0.1


@pytest.mark.parametrize(("tokens", "low", "high"), [(0, 0.2, 4), (100_000, 5, 20)])
def test_a_better_size_is_taken_once_enough_was_wasted(tokens, low, high, monkeypatch):
    """Completions of 20 tokens in rows that were made for 60 waste more at every step.

    An update of few tokens may waste more of them than one: to compile takes as long.
    """
    monkeypatch.setattr(row_sizes, "_RECOMPILE_AT_TOKENS", tokens)
    sizes, first, short = CompiledSizes(), lengths(0, 60), lengths(1, 20)
    size = sizes.fill(work(first)).size
    best = CompiledSizes().fill(work(short))
    wasted = steps = 0.0
    while (filled := sizes.fill(work(short))).size == size:
        wasted += computed(filled) / computed(best) - 1
        steps += 1
        assert steps < 100
    assert filled.size == best.size
    assert low < wasted < high
    assert sizes.fill(work(first)).size == size  # and what was used before still is


def test_rows_without_lanes_have_sizes_of_their_own():
    """As where a run goes on with other kernels, or on another mesh."""
    sizes, length_SPG = CompiledSizes(), lengths(0)
    with_lanes = sizes.fill(work(length_SPG)).size
    without = sizes.fill(work(length_SPG, in_lanes=False)).size
    assert with_lanes.lanes > 0 and without.lanes == 0
    assert sizes.fill(work(length_SPG, in_lanes=False)).size == without
    assert sizes.fill(work(length_SPG)).size == with_lanes
    assert len(sizes.as_json()["used"]) == 2


def test_completions_that_fit_in_no_size_get_one():
    sizes = CompiledSizes()
    small = sizes.fill(work(lengths(0, 4)[:, :2])).size
    length_SPG = np.full((1, 8, 8), TOKENS)
    filled = sizes.fill(work(length_SPG))
    assert filled.size.entries >= 255 > small.entries
    check(work(length_SPG), filled)
    assert sizes.as_json()["used"] == [list(small), list(filled.size)]


@pytest.mark.parametrize("change", [{"multiple": 16}, {"at_once": AT_ONCE // 2}], ids=str)
def test_a_run_resumed_otherwise_has_sizes_that_it_can_use(change):
    """On a mesh that splits rows in more parts, or with smaller microbatches."""
    sizes, length_SPG = CompiledSizes(), lengths(0)
    before = sizes.fill(work(length_SPG, at_once=AT_ONCE + 1, multiple=3)).size
    given = work(length_SPG, **change)
    after = sizes.fill(given)
    check(given, after)
    assert after.size != before and given.allows(after.size) and not given.allows(before)


def test_a_resumed_run_chooses_alike():
    """Through JSON, as a checkpoint keeps it; without, another size is chosen."""
    means = [100, 90, 80, 70, 60, 50, 45, 40, 38, 35] * 2
    given = [work(lengths(step, mean)) for step, mean in enumerate(means)]
    whole, resumed, forgetful = CompiledSizes(), CompiledSizes(), CompiledSizes()
    sizes = [whole.fill(one) for one in given]
    begun = CompiledSizes()
    for one in given[:8]:
        begun.fill(one)
    resumed.restore(json.loads(json.dumps(begun.as_json())))
    assert [resumed.fill(one) for one in given[8:]] == sizes[8:]
    assert resumed.as_json() == whole.as_json()
    assert [forgetful.fill(one) for one in given[8:]] != sizes[8:]
    resumed.restore(None)
    assert resumed.as_json() == CompiledSizes().as_json()


# --- Data shards ----------------------------------------------------------------------------------


def test_shards_have_like_much_to_do():
    """By hand: 100, 90, 20 and 10 entries are 110 and 110."""
    length_PG = np.array([[100, 2], [89, 3], [20, 2], [10, 2]])
    order = row_sizes.balance(length_PG, 2)
    assert sorted(map(sorted, order.reshape(2, 2).tolist())) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("minibatches", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_balanced_prompts_stay_in_their_minibatch(minibatches, shards):
    """Each shard's prompts i, i + n, ... are of minibatch i of n, as they were before."""
    length_PG = lengths(0, prompts=32, spread=0.8)[0]
    order_P = row_sizes.balance(length_PG, shards, minibatches)
    assert sorted(order_P) == list(range(32))
    by_minibatch_SJN = order_P.reshape(shards, -1, minibatches)
    assert (by_minibatch_SJN % minibatches == np.arange(minibatches)).all()
    entries_P = (length_PG - 1).sum(1)
    uneven = lambda order_P: np.ptp(entries_P[order_P].reshape(shards, -1, minibatches).sum(1), 0)  # noqa: E731
    assert (uneven(order_P) <= uneven(np.arange(32))).all()
    if shards > 1:
        assert uneven(order_P).sum() < 0.5 * uneven(np.arange(32)).sum()
