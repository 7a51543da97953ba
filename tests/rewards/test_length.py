import functools

import pytest

from grpo_jax.rewards.length import cosine_length, relative_length, soft_overlong


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


# --- Beside a right or wrong answer ---------------------------------------------------------------

TEXTS, ANSWERS = ["#### 5", "#### 5", "#### 6", "#### 6"], ["5"] * 4


def test_cosine_length_by_hand():
    """Half a cosine: at a quarter of the limit (1 + cos 45°)/2 = 0.853553 of the way remains."""
    ids = [[1] * 0, [1] * 25, [1] * 25, [1] * 300]
    got = cosine_length(
        [""] * 4, TEXTS, answer=ANSWERS, completion_ids=ids, max_completion_tokens=100
    )
    part = 0.8535533905932737
    assert got == pytest.approx([1.0, 0.5 + 0.5 * part, -0.5 - 0.5 * part, -0.5])
    how = {"limit": 50, "right": (2.0, 0.0), "wrong": (0.0, 1.0)}
    half = cosine_length([""] * 4, TEXTS, answer=ANSWERS, completion_ids=ids, **how)
    assert half == pytest.approx([2.0, 1.0, 0.5, 1.0])


def test_relative_length_by_hand():
    """Shares of the range from 10 to 30 tokens: 0, 1/4, 1/2, 1; a wrong answer gets at most 0."""
    ids = [[1] * n for n in (10, 15, 20, 30)]
    right = relative_length([""] * 4, ["#### 5"] * 4, answer=ANSWERS, completion_ids=ids)
    assert right == [0.5, 0.25, 0.0, -0.5]
    wrong = relative_length([""] * 4, ["#### 6"] * 4, answer=ANSWERS, completion_ids=ids)
    assert wrong == [0.0, 0.0, 0.0, -0.5]
    assert relative_length([""] * 2, TEXTS[:2], answer=["5"] * 2, completion_ids=[[1], [2]]) == [
        0,
        0,
    ]


def test_lengths_beside_answers_need_tokens():
    for reward in (cosine_length, relative_length):
        with pytest.raises(ValueError, match="completion_ids"):
            reward([""], ["#### 5"], answer=["5"])
