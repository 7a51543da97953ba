import functools

import pytest

from grpo_jax.rewards.length import soft_overlong


def punish(lengths, limit, **parameters):
    ids = [[1] * length for length in lengths]
    texts = ["a much longer text than it has tokens"] * len(lengths)
    reward = functools.partial(soft_overlong, **parameters)
    return reward(prompts=texts, completions=texts, completion_ids=ids, max_completion_tokens=limit)


def test_by_hand():
    # (100 - 20 - length) / 20 between 80 and 100
    assert punish([0, 79, 80, 81, 90, 100, 101], 100, buffer=20) == [
        0.0, 0.0, 0.0, -0.05, -0.5, -1.0, -1.0
    ]  # fmt: skip


def test_the_default_buffer_is_a_fifth():
    assert punish([80, 90, 100], 100) == [0.0, -0.5, -1.0]
    # DAPO: 4,096 of 20,480, as in docs/prompts.md
    lengths = [16384, 17408, 18432, 19456, 20480]
    want = [0.0, -0.25, -0.5, -0.75, -1.0]
    assert punish(lengths, 20480) == punish(lengths, 20480, buffer=4096) == want
    assert punish([0, 1, 2], 2) == [0.0, 0.0, -1.0]


def test_the_ends_of_the_buffer():
    assert punish([99, 100, 101], 100, buffer=0) == [0.0, 0.0, -1.0]
    assert punish([0, 50, 100], 100, buffer=100) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("buffer", [-1, 101])
def test_a_buffer_outside_the_limit_is_refused(buffer):
    with pytest.raises(ValueError, match=rf"buffer = {buffer} .*limit of a completion is 100"):
        punish([1], 100, buffer=buffer)


def test_tokens_and_limit_are_needed():
    with pytest.raises(ValueError, match="completion_ids"):
        soft_overlong(prompts=["p"], completions=["c"], max_completion_tokens=3)
    with pytest.raises(ValueError, match="max_completion_tokens"):
        soft_overlong(prompts=["p"], completions=["c"], completion_ids=[[1]])
