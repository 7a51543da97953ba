"""Completions in lanes: every token stands once, in order, in few shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from grpo_jax.algorithm import packing


def lengths(prompts: int, group: int, mean: float, tokens: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.geometric(1 / mean, (prompts, group)), 1, tokens)


def stacks(length_PG, groups_P, *, tokens, at_once, prompt_tokens=4, devices=1):
    """The stacks of one shard, each as (count, groups_NM, layout_NMLT)."""
    made = packing.stacks(
        length_PG[None],
        groups_P,
        prompt_tokens=prompt_tokens,
        completion_tokens=tokens,
        at_once=at_once,
        devices=devices,
    )
    return [Stack(stack.count, *(x[0] for x in stack.arrays)) for stack in made]


class Stack(NamedTuple):
    count: int
    groups_NM: np.ndarray
    layout_NMLT: np.ndarray


@pytest.mark.parametrize("mean", [1.5, 8, 1000])
@pytest.mark.parametrize("at_once", [1, 200, 10_000])
@pytest.mark.parametrize("devices", [1, 2])
def test_every_token_stands_once_and_in_order(mean, at_once, devices):
    group, tokens = 6, 32
    length_PG = lengths(8, group, mean, tokens)
    groups_P = np.array([6, 0, 3, 5])
    seen = []
    for stack in stacks(length_PG, groups_P, tokens=tokens, at_once=at_once, devices=devices):
        height, size, lanes, width = stack.layout_NMLT.shape
        assert stack.groups_NM.shape == (height, size) and stack.layout_NMLT.dtype == np.int32
        assert size == devices or size // devices * (4 + lanes * width) <= at_once
        assert height * size == 4 and 1 <= stack.count <= height  # no shape but by lanes
        assert (stack.groups_NM[stack.count :] == -1).all()
        assert (stack.groups_NM[: stack.count, 0] >= 0).all()
        for p, layout_LT in zip(stack.groups_NM.ravel(), stack.layout_NMLT.reshape(4, lanes, -1)):
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
    (stack,) = stacks(np.full((2, 4), 8), np.arange(2), tokens=8, at_once=64)
    want = np.arange(4)[:, None] * 8 + np.arange(1, 8)[None]
    np.testing.assert_array_equal(stack.layout_NMLT, [[want, want]])
    assert stack.count == 1


def test_microbatches_hold_as_many_groups_as_their_tokens_allow():
    """By hand: a full group takes 4 + 4 * 7 = 32 tokens; 95 allow two of them, not three."""
    full = np.full((6, 4), 8)
    (stack,) = stacks(full, np.arange(6), tokens=8, at_once=95)
    assert stack.groups_NM.tolist() == [[0, 1], [2, 3], [4, 5]] and stack.count == 3
    (stack,) = stacks(full, np.arange(6), tokens=8, at_once=1)
    assert stack.groups_NM.shape == (6, 1)


def test_short_completions_share_lanes_and_microbatches():
    """By hand: 7 slots a lane. Groups 0 and 1 fill one lane, group 2 needs four."""
    length_PG = np.array([[4, 4, 1, 2], [4, 1, 1, 1], [8, 8, 8, 8]])
    full, short = stacks(length_PG, np.arange(3), tokens=8, at_once=40)
    assert full.groups_NM[: full.count].tolist() == [[2]] and full.layout_NMLT.shape[2:] == (4, 7)
    assert short.groups_NM[: short.count].tolist() == [[0, 1, -1]]
    assert short.layout_NMLT.shape[2:] == (1, 7)
    assert short.layout_NMLT[0, 0, 0].tolist() == [1, 2, 3, 9, 10, 11, 25]
    assert short.layout_NMLT[0, 1, 0].tolist() == [1, 2, 3, -1, -1, -1, -1]


def test_data_shards_take_equally_many_of_their_own():
    """By hand: a group of shard 0 needs four lanes, all others one; shard 1 does not wait."""
    length_SPG = np.array([[[8, 8, 8, 8], [2, 2, 2, 2]], [[3, 3, 1, 1], [2, 2, 2, 2]]])
    wide, narrow = packing.stacks(
        length_SPG, np.arange(2), prompt_tokens=4, completion_tokens=8, at_once=32
    )
    assert wide.count == narrow.count == 1
    assert wide.groups_SNM[:, 0].tolist() == [[0], [0]] and wide.layout_SNMLT.shape[3] == 4
    assert narrow.groups_SNM[:, 0].tolist() == [[1, -1], [1, -1]]
    assert wide.layout_SNMLT[1, 0, 0, 0].tolist() == [1, 2, 9, 10, -1, -1, -1]
    assert (wide.layout_SNMLT[1, 0, 0, 1:] == -1).all()


def test_completions_of_one_token():
    (stack,) = stacks(np.ones((1, 3), int), np.arange(1), tokens=1, at_once=8)
    assert (stack.layout_NMLT == -1).all()


def test_shapes_are_few():
    shapes = {
        stack.layout_NMLT.shape
        for seed in range(50)
        for stack in stacks(lengths(16, 8, 16, 64, seed), np.arange(16), tokens=64, at_once=512)
    }
    assert len(shapes) <= 6
