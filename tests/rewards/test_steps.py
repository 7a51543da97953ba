"""Equations in a text, checked by exact fractions."""

import pytest
from growth import assert_linear

from grpo_jax.rewards import equations
from grpo_jax.rewards.steps import right_steps

RIGHT, WRONG = True, False


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12 * 6 = 72", [("12 * 6 = 72", RIGHT)]),
        ("He has <<48/2=24>>24 left.", [("48/2=24", RIGHT)]),
        ("5 + 3 = 8 apples, 8 * 2 = 17.", [("5 + 3 = 8", RIGHT), ("8 * 2 = 17", WRONG)]),
        (r"$\frac{1}{2} \times 4 = 2$", [(r"\frac{1}{2} \times 4 = 2", RIGHT)]),
        (r"3 + 4 = \boxed{8}", [(r"3 + 4 = \boxed{8", WRONG)]),
        ("x = 2 + 3 = 5", [("2 + 3 = 5", RIGHT)]),
        ("7 - 5 = 2 = 1 + 1", [("7 - 5 = 2", RIGHT), ("2 = 1 + 1", RIGHT)]),
        ("Step 1. 2 + 3 = 6.", [("2 + 3 = 6", WRONG)]),
        ("- 5 + 3 = 8\n* 8 × 2 = 16", [("5 + 3 = 8", RIGHT), ("8 × 2 = 16", RIGHT)]),
        ("**2+2 = 4**", [("2+2 = 4", RIGHT)]),
        ("2(3+4) = 14", [("2(3+4) = 14", RIGHT)]),
        ("2**3 = 8, 2^3=9", [("2**3 = 8", RIGHT), ("2^3=9", WRONG)]),
        ("1,200 + 34 = 1,234", [("1,200 + 34 = 1,234", RIGHT)]),
        ("$5 * 2 = $10", [("5 * 2 = $10", RIGHT)]),
        ("50 * 20% = 10", [("50 * 20% = 10", RIGHT)]),
        ("-3 + 5 = 2", [("-3 + 5 = 2", RIGHT)]),
        ("5 x 3 = 15", [("5 x 3 = 15", RIGHT)]),
        ("2+3=5kg", [("2+3=5", RIGHT)]),
        ("10 - 2 = 8 - so", [("10 - 2 = 8", RIGHT)]),
        ("0.1 + 0.2 = 0.3", [("0.1 + 0.2 = 0.3", RIGHT)]),  # floats differ by 4e-17
        # rounded to the decimals that are shown
        ("10/3 = 3.33", [("10/3 = 3.33", RIGHT)]),
        ("10/3 = 3.34", [("10/3 = 3.34", WRONG)]),
        ("10/3 = 3", [("10/3 = 3", WRONG)]),
        ("10/3 ≈ 3", [("10/3 ≈ 3", RIGHT)]),
        (
            "100 - 53 = 47%, .25 * 100 = 25%",
            [("100 - 53 = 47%", RIGHT), (".25 * 100 = 25%", RIGHT)],
        ),
        # a side that goes on beyond what can be read
        ("2 apples + 12 - 18 = 45", []),
        ("60 questions x 60/100 = 36", []),
        ("10% of 150 = 10 + 5", []),
        ("a total of 3 * 4 = 12", [("3 * 4 = 12", RIGHT)]),
        ("3 1/2 - 2 = 1", []),
        ("5 - 1/2 = 4 1/2", []),
        ("$350, 000 + 1 = 2", []),
        ("250 x 12 = 3, 000 grams", []),
        ("at 6:00+48=6:48", []),
        ("√(144) = 12", []),
        ("10/5 = 2 (the half)", [("10/5 = 2", RIGHT)]),
        # what cannot be computed, or says nothing, is no step
        ("2x = 6", []),
        ("a+3 = 8", []),
        ("x2 = 6 + 0", []),
        ("2+3=5x", []),
        ("10 - 2 = 8 + 1x", []),
        ("5 = 5", []),
        ("3 >= 2+1", []),
        ("1/0 = 5", []),
        ("9**9**9 = 3", []),
        ("2+2 = ", []),
        ("= 4 + 1", []),
        ("5+(3=8", []),
    ],
)
def test_equations(text, found):
    assert [(text[e.start : e.end], e.is_right) for e in equations.find(text)] == found


def test_values_are_exact():
    (equation,) = equations.find("1/3 + 1/3 = 2/3")
    assert equation.left == equation.right and equation.left.denominator == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+1=2. 2+2=4.", 1.0),
        ("1+1=2. 2+2=4. 3+3=7. 4+4=8.", 0.5),  # the third of four is wrong
        ("1+1=3. 2+2=4.", 0.0),
        ("<think>1+1=2</think>2+2=5", 0.5),
        ("none", 0.0),
    ],
)
def test_right_steps(text, value):
    assert right_steps([""], [text]) == [value]


def test_steps_count_up_to_the_first_wrong_one():
    told = []
    texts = ["none", "1+1=2, 2+2=5, 3+3=6", "1+1=2, 2+2=4."]
    assert right_steps([""] * 3, texts, log_steps=told.extend) == [0, pytest.approx(1 / 3), 1]
    assert told == [[], [(5, 1.0), (12, 0.0)], [(5, 1.0), (12, 1.0)]]


def test_what_right_steps_takes_and_logs():
    logged = []
    log = lambda name, value: logged.append((name, value))  # noqa: E731
    assert right_steps([""] * 2, ["none", "1+1=3. 2+2=4."], without=0.5, log_metric=log) == [0.5, 0]
    share = "right_steps.right_share"
    assert logged == [("right_steps.steps", 0), ("right_steps.steps", 2), (share, 0.5)]
    assert right_steps([""], ["10/3 = 3.33"], rounded=False) == [0.0]


@pytest.mark.parametrize("piece", ["=", "1+", "(", "1 = 1 + 1 ", " ", "\\frac{", "- \n", "9x", "1"])
def test_the_cost_is_linear(piece):
    assert_linear(lambda n: equations.find(piece * n + "=1+1"), 20_000)
