"""Over-sampling: which groups are kept, what they are, and what is saved."""

from __future__ import annotations

import functools

import jax
import made_once
import numpy as np
import pytest
import tiny

from grpo_jax import keys
from grpo_jax.devices import sharding
from grpo_jax.sampling.board import Drawn
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.early_stop import FirstGroups, steps_between
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Sampling

GROUP, LIMIT, WANTED = 2, 32, 5
PROMPTS = [[7], [5, 6, 7, 8, 9], [30, 2], [11, 12, 13], [3, 3, 3, 3], [39], [8, 2], [21]]
STOPS = (1, 4, 17)  # a completion has 13 tokens in the mean: some stop at once, some never


@functools.cache
def engine(devices: int = 1, num_slots: int = 0) -> Engine:
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    decoder = Decoder(tiny.MODEL, mesh, Sampling(), STOPS, LIMIT)
    return made_once.engine(decoder, num_slots=num_slots)


def generate(engine: Engine, first: FirstGroups | None = None, **more):
    return engine.generate(
        engine.publish(tiny.params()), PROMPTS, group=GROUP, key=keys.key_for(0, "rollout", 3),
        temperature=1.0, first=first, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    """All groups, each finished."""
    return generate(engine())


@pytest.fixture(scope="module")
def shortest(whole) -> list[int]:
    """The groups whose longest completion is among the shortest, by hand."""
    longest_P = whole.length_PG.max(axis=1)
    assert len(set(longest_P)) > 4 and longest_P.max() == LIMIT  # else nothing is to choose
    return sorted(sorted(range(len(PROMPTS)), key=lambda p: (longest_P[p], p))[:WANTED])


def assert_kept(found, whole, first: FirstGroups) -> None:
    """The kept groups are those of a draw that was not stopped; of the others a part was drawn."""
    for p in first.kept:
        for name in ("completion_PGC", "length_PG", "stopped_PG"):
            np.testing.assert_array_equal(getattr(found, name)[p], getattr(whole, name)[p])
        np.testing.assert_allclose(found.logp_PGC[p], whole.logp_PGC[p], atol=1e-4)
    np.testing.assert_array_equal(first.length_PG[first.kept], whole.length_PG[first.kept])
    assert (first.length_PG <= whole.length_PG).all()
    assert first.length_PG.sum() < whole.length_PG.sum()


@pytest.mark.parametrize("devices", [1, 2])
def test_the_groups_that_finish_first_are_kept_whatever_the_mesh(whole, shortest, devices):
    handed, first = {}, FirstGroups(WANTED, len(PROMPTS), GROUP)
    found = generate(engine(devices), first, on_group=handed.__setitem__)

    assert first.kept == shortest
    assert_kept(found, whole, first)
    assert sorted(handed) == shortest
    for p, completions in handed.items():
        assert [len(ids) for ids in completions] == whole.length_PG[p].tolist()
    # No decode step beyond the look at which there were enough.
    needed, between = whole.length_PG[shortest].max(), steps_between(engine().decoder)
    assert needed <= first.length_PG.max() <= 1 + -(-(needed - 1) // between) * between < LIMIT


def test_with_few_slots_a_draw_ends_too_and_always_with_the_same_groups(whole):
    """What waits for a slot then is not begun."""
    kept = []
    for _ in range(2):
        first = FirstGroups(2, len(PROMPTS), GROUP)
        found = generate(engine(num_slots=8), first)
        assert_kept(found, whole, first)
        assert len(first.kept) == 2 and not first.length_PG[-1].any()
        kept.append(first.kept)
    assert kept[0] == kept[1]


def test_if_all_are_wanted_all_are_finished(whole):
    first = FirstGroups(len(PROMPTS), len(PROMPTS), GROUP)
    generate(engine(), first)
    assert first.kept == [*range(len(PROMPTS))]
    np.testing.assert_array_equal(first.length_PG, whole.length_PG)


def finished(**lengths: int) -> Drawn:
    """Completions by their rows, such as r3=7: row 3 has 7 tokens."""
    rows = np.array([int(name[1:]) for name in lengths], np.int64)
    nothing = np.zeros((len(rows), 0))
    return Drawn(rows, nothing, nothing, np.array([*lengths.values()], np.int64), rows >= 0)


def test_the_order_of_finishing_by_hand():
    first = FirstGroups(3, 5, 2)
    first.take(finished())
    first.take(finished(r6=2, r7=3, r0=1))  # group 3
    first.take(finished(r8=8, r9=7, r5=8))  # group 4; of group 2 one is missing
    assert first.kept == [3, 4] and not first.is_met
    # Groups 0, 1 and 2: the first has a longest completion of 10 tokens, the others have 9.
    first.take(finished(r4=9, r2=9, r3=1, r1=10))
    assert first.is_met and first.kept == [1, 3, 4] and first.keeps(1) and not first.keeps(2)
    first.cut(np.array([4]), np.array([11]))
    assert first.length_PG.tolist() == [[1, 10], [9, 1], [11, 8], [2, 3], [8, 7]]


def test_the_host_looks_rarely():
    """At most every fourth step, 64 times in a long completion, and in steps of the device."""
    for limit, steps, want in ((8, 1, 4), (512, 1, 8), (512, 8, 8), (4096, 8, 64), (700, 8, 16)):
        decoder = Decoder(tiny.MODEL, None, Sampling(), STOPS, limit, steps=steps)
        assert steps_between(decoder) == want
