"""Completions in rows and lanes: every token stands once, in order, in few shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from grpo_jax.learner import packing


def lengths(prompts: int, group: int, mean: float, tokens: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.geometric(1 / mean, (prompts, group)), 1, tokens)


def pack(length_PG, groups_P, *, tokens, at_once, prompt_tokens=4, devices=1, sizes=None):
    """The microbatches of one shard, without those that hold nothing."""
    made = packing.pack(
        length_PG[None],
        groups_P,
        prompt_tokens=prompt_tokens,
        completion_tokens=tokens,
        at_once=at_once,
        devices=devices,
        sizes=sizes,
    )
    assert len(made.groups_SMJ[0]) <= max(3 * made.number, 4)
    for x in made.arrays:
        assert (x[0, made.number :] <= (-1 if x.dtype == np.int32 else 0)).all()
    return Shard(*(x[0, : made.number] for x in made.arrays))


class Shard(NamedTuple):
    groups_MJ: np.ndarray
    own_MJG: np.ndarray
    token_MBX: np.ndarray
    lane_MJWT: np.ndarray


@pytest.mark.parametrize("mean", [1.5, 8, 1000])
@pytest.mark.parametrize("at_once", [1, 100, 500, 10_000])
@pytest.mark.parametrize("devices", [1, 2])
def test_every_token_stands_once_and_in_order(mean, at_once, devices):
    group, tokens = 6, 32
    length_PG = lengths(8, group, mean, tokens)
    groups_P = np.array([6, 0, 3, 5])
    made = pack(length_PG, groups_P, tokens=tokens, at_once=at_once, devices=devices)
    assert {x.dtype for x in made} == {np.dtype(np.int32), np.dtype(bool)}
    count, size = made.groups_MJ.shape
    per_device = size // devices
    seen = np.zeros((8, group, tokens), int)
    for n, d in np.ndindex(count, devices):
        token_X = made.token_MBX[n, d]
        used = []
        for j in range(per_device):
            m = d * per_device + j
            p, own_G = made.groups_MJ[n, m], made.own_MJG[n, m]
            lane_LT = made.lane_MJWT[n, m]
            assert (p >= 0) == own_G.any() and (p >= 0 or (lane_LT < 0).all())
            seen[p, own_G, 0] += 1
            for lane_T in lane_LT:
                entry = lane_T[lane_T >= 0]
                assert (lane_T[: len(entry)] == entry).all()  # what is empty stands last
                used += entry.tolist()
                own, c = np.divmod(token_X[entry], tokens)
                owner, g = np.divmod(own, group)
                assert (owner == j).all() and own_G[g].all()
                seen[p, g, c] += 1
                starts = np.flatnonzero(np.diff(g, prepend=-1))  # a completion's tokens follow on
                assert len(starts) == len(set(g)) and (c[starts] == 1).all()
                others = np.setdiff1d(np.arange(len(c)), starts)
                assert (c[others] == c[others - 1] + 1).all()
        assert sorted(used) == np.flatnonzero(token_X >= 0).tolist()  # each entry in one lane
    want = np.arange(tokens) < length_PG[..., None]
    want[np.setdiff1d(np.arange(8), groups_P)] = False
    np.testing.assert_array_equal(seen, want)


@pytest.mark.parametrize("mean", [3, 16])
@pytest.mark.parametrize("at_once", [64, 300, 1000])
def test_rows_are_full_and_keep_their_limit(mean, at_once):
    length_PG = lengths(32, 8, mean, 64)
    made = pack(length_PG, np.arange(32), tokens=64, at_once=at_once)
    size = made.groups_MJ.shape[1]
    token_MX = made.token_MBX[:, 0]
    used_N = (token_MX >= 0).sum(1)
    assert (size * 4 + used_N <= max(at_once, 4 + 63)).all()
    if at_once > 64:  # where there is something to choose from
        assert (token_MX >= 0).mean() > 0.8


def test_full_completions_have_a_lane_each():
    made = pack(np.full((2, 4), 8), np.arange(2), tokens=8, at_once=63)
    assert made.groups_MJ.tolist() == [[0], [1]] and made.own_MJG.all()
    want = np.arange(4)[:, None] * 8 + np.arange(1, 8)
    np.testing.assert_array_equal(made.token_MBX[:, 0], [want.ravel()] * 2)  # and no more
    np.testing.assert_array_equal(made.lane_MJWT[1, 0], np.arange(28).reshape(4, 7))


def test_microbatches_hold_as_many_groups_as_their_tokens_allow():
    """By hand: two full groups take 2 * 4 + 2 * 4 * 7 = 64 tokens."""
    full = np.full((6, 4), 8)
    made = pack(full, np.arange(6), tokens=8, at_once=64)
    assert sorted(made.groups_MJ.ravel()) == list(range(6)) and made.groups_MJ.shape == (3, 2)
    assert pack(full, np.arange(6), tokens=8, at_once=63).groups_MJ.shape == (6, 1)


def test_short_completions_share_lanes():
    """By hand: 7 places a lane. Groups 0 and 1 fill one lane; group 2, in halves, two and two."""
    length_PG = np.array([[4, 4, 1, 2], [4, 1, 1, 1], [8, 8, 8, 8]])
    made = pack(length_PG, np.arange(3), tokens=8, at_once=49)
    assert made.groups_MJ.tolist() == [[2, 0], [2, 1]]  # 14 + 7 entries, and 14 + 3
    assert made.own_MJG[:, 0].astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert made.lane_MJWT.shape == (2, 2, 2, 7) and made.token_MBX.shape == (2, 1, 22)
    assert made.lane_MJWT[:, 0].tolist() == [[[*range(7)], [*range(7, 14)]]] * 2
    assert made.lane_MJWT[0, 1, 0].tolist() == [*range(14, 21)]
    assert made.lane_MJWT[1, 1, 0].tolist() == [14, 15, 16, -1, -1, -1, -1]
    assert made.token_MBX[0, 0, 14:].tolist() == [33, 34, 35, 41, 42, 43, 57, -1]
    assert (made.lane_MJWT[:, 1, 1:] == -1).all()


def test_a_group_of_too_many_tokens_is_split():
    """By hand: 4 * 7 tokens, and 16 places after the prompt: two completions stand together."""
    made = pack(np.array([[8, 8, 8, 8]]), np.arange(1), tokens=8, at_once=20)
    assert made.groups_MJ.tolist() == [[0], [0]]
    assert made.own_MJG.astype(int).tolist() == [[[1, 0, 1, 0]], [[0, 1, 0, 1]]]
    assert made.token_MBX[1, 0, :14].tolist() == [*range(9, 16), *range(25, 32)]
    assert made.lane_MJWT.shape == (2, 1, 2, 7)


def test_parts_of_a_group_are_alike():
    """Eight full completions and room for seven: 4 + 4 in two rows, nothing padded."""
    for prompts in (1, 8):
        made = pack(np.full((prompts, 8), 17), np.arange(prompts), tokens=17, at_once=4 + 7 * 16)
        assert made.own_MJG.sum(axis=(1, 2)).tolist() == [4] * 2 * prompts
        assert made.token_MBX.shape == (2 * prompts, 1, 4 * 16)


def test_lanes_of_their_own():
    """By hand: completions of 3, 2 and 1 tokens share a lane of 16 places, or have one each."""
    args = np.array([[[3, 2, 1]]]), np.arange(1)
    sizes = {"prompt_tokens": 4, "completion_tokens": 17, "at_once": 100}
    shared_LT = packing.pack(*args, **sizes).lane_SMJWT[0, 0, 0]
    assert shared_LT[:, :4].tolist() == [[0, 1, 2, -1]]
    own_LT = packing.pack(*args, **sizes, share_lanes=False).lane_SMJWT[0, 0, 0]
    assert own_LT[:, :2].tolist() == [[0, 1], [2, -1], [-1, -1]]
    assert own_LT.max() == 2


def test_rows_without_lanes():
    """By hand: completions follow each other; the second group has more tokens and stands first."""
    args = np.array([[[3, 2, 1], [17, 17, 17]]]), np.arange(2)
    sizes = {"prompt_tokens": 4, "completion_tokens": 17, "at_once": 100}
    made = packing.pack(*args, **sizes, in_lanes=False)
    assert made.number == 1 and made.lane_SMJWT.shape[3] == 0
    token_X = made.token_SMBX[0, 0, 0]
    there = [*range(1, 17), *range(18, 34), *range(35, 51), 52, 53, 69]
    assert token_X[token_X >= 0].tolist() == there and (token_X[: len(there)] >= 0).all()
    assert made.groups_SMJ[0, 0].tolist() == [1, 0] and made.own_SMJG[0, 0].all()


def test_data_shards_have_one_shape():
    """By hand: a group of shard 0 has 28 entries, all others 4; it is halved, with two lanes."""
    length_SPG = np.array([[[8, 8, 8, 8], [2, 2, 2, 2]], [[3, 3, 1, 1], [2, 2, 2, 2]]])
    made = packing.pack(length_SPG, np.arange(2), prompt_tokens=4, completion_tokens=8, at_once=36)
    assert made.number == 2
    assert made.groups_SMJ[:, :2].tolist() == [[[0, 1], [0, -1]], [[0, -1], [1, -1]]]
    assert made.lane_SMJWT.shape == (2, 4, 2, 2, 7)
    assert made.token_SMBX[1, :2, 0, :5].tolist() == [[1, 2, 9, 10, -1], [1, 9, 17, 25, -1]]


def test_completions_of_one_token():
    made = pack(np.ones((1, 3), int), np.arange(1), tokens=1, at_once=8)
    assert (made.lane_MJWT == -1).all() and (made.token_MBX == -1).all() and made.own_MJG.all()
