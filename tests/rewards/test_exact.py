import numpy as np
import pytest
from growth import assert_linear

from grpo_jax.rewards.exact import exact_answer, same_answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("72", "72.0"),
        ("1,234,567", "1234567"),
        ("0.1", ".10"),
        ("1/2", "0.5"),
        ("-\\frac{1}{2}", "-1/2"),
        ("\\dfrac{3}{4}", "0.75"),
        ("\u22125", "-5"),
        ("50\\%", "50"),
        ("\\$18", "18"),
        ("1e3", "1000"),
        ("10 000", "10000"),
        ("\\frac12", "1/2"),
        ("\\dfrac{3}4", "0.75"),
        ("Paris", " paris "),
        ("\\sqrt2", "\\sqrt{2}"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("10" * 60, "10" * 60),
        ("1,\\! 234", "1234"),
        ("５½", "5\\frac{1}{2}"),
        ("Α και Ω", "α και ω"),
        ("\\text{Yes}", "\\text{yes}"),
        ("b", "B"),
    ],
)
def test_equal_answers(one, other):
    assert same_answer(one, other) and same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("72", "73"),
        ("0.1", "0.10000000000000001"),
        ("12,34", "1234"),
        ("1/0", "0"),
        ("50%", "0.5"),
        ("nan", "0"),
        ("x", "y"),
        ("1/2", "-1/2"),
        ("7 2", "7"),
        ("7 2", "72"),
        ("1 1/2", "11/2"),
        ("1, 234", "1234"),
        ("1, 234", "1,234"),
        ("\\pi", "\\Pi"),
        ("2R", "2r"),
        ("A\\rightarrow B", "A\\leftarrow B"),
        ("5²", "52"),
    ],
)
def test_different_answers(one, other):
    assert not same_answer(one, other) and not same_answer(other, one)


@pytest.mark.parametrize(
    "text_of",
    [
        lambda n: "9" * 10 * n,
        lambda n: "1e" + "9" * n,
        lambda n: "9" + "**9" * n,
        lambda n: "\\boxed{" * n,
        lambda n: "<answer>" * n,
        lambda n: "####" * n,
    ],
)
def test_no_completion_keeps_it_busy(text_of):
    def run(n):
        assert exact_answer([""], ["#### " + text_of(n)], answer=["3"]) == [0.0]

    assert_linear(run, 5000)


def test_exact_answer_by_row():
    answers = ["48/2=24, 24+48=72\n#### 72", 72, 72.0, np.float32(0.1), "so \\boxed{1,000}", "x"]
    completions = ["#### 72", "The answer is 72.", "72", "#### 0.1", "#### $1000", "#### y"]
    completions[0] = [{"role": "assistant", "content": completions[0]}]
    rewards = exact_answer([""] * 6, completions, answer=answers, difficulty=[1] * 6)
    assert rewards == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", [None, "", " $ ", "####"])
def test_a_row_without_answer_is_refused(answer):
    with pytest.raises(ValueError, match="`answer`"):
        exact_answer(["", ""], ["", ""], answer=["1", answer])
    assert exact_answer.column_faults["answer"](answer)
    assert exact_answer.column_faults["answer"]("1") is None
