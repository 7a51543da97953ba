"""Numbers near the right one, and letters of choices, by hand."""

import functools
from fractions import Fraction

import pytest

from grpo_jax.rewards.choices import letter_fault, multiple_choice
from grpo_jax.rewards.numeric import number_fault, number_of, numeric_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("-1,234.50", Fraction("-1234.5")),
        ("1/4", Fraction(1, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("3e8", 300_000_000),
        (r"3 \times 10^8", 300_000_000),
        (r"1.5\cdot 10^{-2}", Fraction("0.015")),
        ("10^3", 1000),
        ("2 x 10^3", 2000),
        ("5 m/s", 5),
        (r"5\text{ cm}", 5),
        ("$12.50", Fraction("12.5")),
        ("seventy", None),
        ("x = 5", None),
        ("1" * 300, None),
    ],
)
def test_what_a_number_is(text, value):
    assert number_of(text) == value


def near(completion, answer, **how):
    return functools.partial(numeric_answer, **how)([""], [completion], answer=[answer])[0]


def test_near_is_relative_or_absolute():
    assert near("#### 100.1", 100) == 1.0  # a thousandth of 100
    assert near("#### 100.11", 100) == 0.0
    assert near("#### 104", 100, relative=0.05) == near("#### 96", 100, relative=0.05) == 1.0
    assert near("#### 106", 100, relative=0.05) == 0.0
    assert near("#### 0.01", 0, relative=0.5) == 0.0  # nothing is near 0 relatively
    assert near("#### 0.01", 0, absolute=0.01) == 1.0
    assert near("The answer is 3.1416 meters.", "3.14159") == 1.0
    assert near("<think>#### 5</think> none", 5) == near("no number", 5) == 0.0
    assert numeric_answer([""], [[{"role": "assistant", "content": "\\boxed{5}"}]], answer=[5]) == [
        1
    ]


@pytest.mark.parametrize("value", [None, "none", "", True, float("inf")])
def test_an_answer_that_is_no_number(value):
    assert number_fault(value) and number_fault("12 apples") is None
    with pytest.raises(ValueError, match="`answer`"):
        numeric_answer([""], ["#### 1"], answer=[value])


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("#### B", "B", 1.0),
        ("The answer is (B).", "B", 1.0),
        (r"\boxed{\text{B}}", "B", 1.0),
        ("<answer>B) Paris</answer>", "(B)", 1.0),
        ("b", "B", 1.0),
        ("**B**", "B", 1.0),
        ("Some reasons.\nB. Paris", "B", 1.0),
        ("C: since\nit is so", "C", 1.0),
        ("#### B", 1, 1.0),  # the number of the choice, from 0
        ("#### A", 1, 0.0),
        ("A cat sat.", "A", 0.0),
        ("5 a.m.", "A", 0.0),
        ("", "A", 0.0),
        ("<think>B", "B", 0.0),
        ("A or B", "B", 0.0),
    ],
)
def test_letters(completion, answer, reward):
    assert multiple_choice([""], [completion], answer=[answer]) == [reward]


def test_a_choice_stands_for_its_letter():
    choices = [["Rome", "Paris", "72"]]
    assert multiple_choice([""], ["The answer is Paris."], ["B"], choices=choices) == [1.0]
    assert multiple_choice([""], ["#### 72.0"], ["C"], choices=choices) == [1.0]
    assert multiple_choice([""], ["#### B"], ["Paris"], choices=choices) == [1.0]
    assert multiple_choice([""], ["#### Rome"], [1], choices=choices) == [0.0]
    with pytest.raises(ValueError, match="`answer` names no choice: 3"):
        multiple_choice([""], ["#### B"], [3], choices=choices)


@pytest.mark.parametrize("value", [None, 1.5, True, -1, 26, " "])
def test_an_answer_that_is_no_choice(value):
    assert letter_fault(value) and not letter_fault("B") and not letter_fault(0)
