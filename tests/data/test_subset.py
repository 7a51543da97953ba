import pytest

from grpo_jax.data import subset

LETTERS = list("abcdef")


@pytest.mark.parametrize(
    ("chosen", "want"),
    [
        ((), "abcdef"),
        ((0,), "a"),
        (("5", 0), "fa"),
        (("1:3", 5), "bcf"),
        (("4:",), "ef"),
        ((":2",), "ab"),
    ],
)
def test_numbers_and_ranges(chosen, want):
    assert subset.take(LETTERS, chosen) == list(want)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ((6,), "6 names no problems of the 6 training problems"),
        (("3:3",), "'3:3' names no problems"),
        (("2:7",), "'2:7' names no problems of the 6"),
        ((-1,), "-1 is neither the number of a problem nor a range"),
        (("a",), "'a' is neither"),
        ((1.0,), "1.0 is neither"),
        ((1, "0:2"), "has problem 1 twice"),
    ],
)
def test_what_names_no_problem_is_refused(chosen, told):
    with pytest.raises(ValueError, match=r"data\.subset") as info:
        subset.take(LETTERS, chosen)
    assert told in str(info.value)
