"""Completions in lanes: every token stands once, in order, in few shapes."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax.algorithm import packing


def lengths(prompts: int, group: int, mean: float, tokens: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.geometric(1 / mean, (prompts, group)), 1, tokens)


@pytest.mark.parametrize("mean", [1.5, 8, 1000])
@pytest.mark.parametrize("size", [1, 2])
def test_every_token_stands_once_and_in_order(mean, size):
    group, tokens = 6, 32
    length_PG = lengths(8, group, mean, tokens)
    groups_P = np.array([6, 0, 3, 5])
    seen = []
    for part in packing.parts(length_PG, tokens, groups_P, size):
        assert len(part.groups_M) == len(part.layout_MLT) and part.layout_MLT.dtype == np.int32
        for p, layout_LT in zip(part.groups_M, part.layout_MLT):
            if p < 0:
                assert (layout_LT == -1).all()
                continue
            seen.append(int(p))
            placed = sorted(layout_LT[layout_LT >= 0])
            want = [g * tokens + c for g in range(group) for c in range(1, length_PG[p, g])]
            assert placed == want
            for lane_T in layout_LT:  # a completion's tokens follow each other
                g, c = np.divmod(lane_T[lane_T >= 0], tokens)
                starts = np.flatnonzero(np.diff(g, prepend=-1))
                assert len(starts) == len(set(g)) and (c[starts] == 1).all()
                others = np.setdiff1d(np.arange(len(c)), starts)
                assert (c[others] == c[others - 1] + 1).all()
    assert sorted(seen) == [0, 3, 5, 6]


def test_full_completions_have_a_lane_each():
    (part,) = packing.parts(np.full((2, 4), 8), 8, np.arange(2), 2)
    want = np.arange(4)[:, None] * 8 + np.arange(1, 8)[None]
    np.testing.assert_array_equal(part.layout_MLT, [want, want])


def test_short_completions_share_lanes_and_parts():
    """By hand: 7 slots a lane; 3 + 3, 2 + 2 in one; two such groups in the place of a full one."""
    length_PG = np.array([[4, 4, 1, 2], [4, 1, 1, 1]])
    (part,) = packing.parts(length_PG, 8, np.arange(2), 1)
    assert part.groups_M.tolist() == [0, 1, -1, -1] and part.layout_MLT.shape == (4, 1, 7)
    assert part.layout_MLT[0, 0].tolist() == [1, 2, 3, 9, 10, 11, 25]
    assert part.layout_MLT[1, 0].tolist() == [1, 2, 3, -1, -1, -1, -1]


def test_completions_of_one_token():
    (part,) = packing.parts(np.ones((1, 3), int), 1, np.arange(1), 1)
    assert (part.layout_MLT == -1).all()


def test_shapes_are_few():
    shapes = {
        part.layout_MLT.shape
        for seed in range(50)
        for part in packing.parts(lengths(16, 8, 16, 64, seed), 64, np.arange(16), 1)
    }
    assert len(shapes) <= 6
