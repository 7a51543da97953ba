import numpy as np
import pytest
from growth import assert_linear

from grpo_jax.rewards.answers import answer_fault, extract_answer, stated_answer, strip
from grpo_jax.rewards.exact import same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 5\nNo, wait.\n#### 6\nDone.", "6"),
        ("#### $1,200.", "1,200"),
        ("so \\boxed{3} and then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{ \\{1, 2\\} }", "\\{1, 2\\}"),
        ("\\boxed{7} and a cut \\boxed{8", "7"),
        ("\\boxed{\\boxed{3}+x}", "3"),
        ("\\fbox{7}", "7"),
        ("$x = \\boxed 5$.", "5"),
        ("it is \\boxed 5.", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed{}\n#### 4", "4"),
        ("\\boxed{\\left\\{1\\right\\}}", "\\left\\{1\\right\\}"),
        ("} { \\boxed{1} } }", "1"),
        ("<answer>71</answer> no <answer>\n72\n</answer>", "72"),
        ("<answer>71</answer> and a cut <answer>7", "71"),
        ("<answer>The answer is 5.</answer>", "5"),
        ("<answer>$\\boxed{5}$</answer>", "5"),
        ("The answer is 10", "10"),
        ("I think the Answer is: $3.50. It is cheap.", "3.50"),
        ("The answer is 1. No, the answer is **2**.", "2"),
        ("answer: 10", "10"),
        ("Answer = 10", "10"),
        ("**Final Answer**: 10", "10"),
        ("**Final Answer:** 10", "10"),
        ("Final answer is $10$.", "10"),
        ("The final answer is\n\\[\n10\n\\]", "10"),
        ("The answer is \\(10\\).", "10"),
        ("The answer is $x = 3$ because I say so.", "x = 3"),
        ("The answer is $5 and not $6", "5 and not $6"),
        ("The answer to the question is 5", "5"),
        ("The answer isn't 5", None),
        ("\\boxed{1} is wrong. #### 2", "2"),
        ("#### Step 4\nso \\boxed{2}", "2"),
        ("#### Conclusion\nThe answer is 3.", "3"),
        ("\\boxed{12}. The answer is therefore found.", "12"),
        ("<answer>1</answer> \\boxed{2}", "2"),
        ("The answer is 1 <answer>2</answer>", "2"),
        ("$\\boxed{2}$, $\\boxed{3}$ and $\\boxed{5}$", "2, 3, 5"),
        ("\\boxed{1}\\boxed 2", "1, 2"),
        ("\\boxed{1} papers and \\boxed{2} bins", "1, 2"),
        ("\\boxed{1}, \\boxed{2}, \\boxed{1}", "2, 1"),  # what repeats a later one is left out
        ("\\boxed{1} of the many that there are \\boxed{2}", "2"),
        ("\\boxed{1}, " + "and on " * 10 + "\\boxed{2}", "2"),
        ("\\boxed{1}, \\boxed{2} or rather \\boxed{3}, \\boxed{4}", "3, 4"),
        ("\\boxed{\\phantom{2}}, then \\boxed{4}", "4"),
        ("Final Answer: The least $n$ is 34. It works.", "34"),
        ("Final answer: the sum of 3 and 4 is $7$ as it should be", "7"),
        ("Final answer: the total, if k is 3", "the total, if k is 3"),  # nothing is said of it
        ("Final answer: our n, not above 5, is 4", "our n, not above 5, is 4"),
        ("Answer: it is not 5", "not 5"),
        ("The answer is: the least $n$ is 34 if $m$ is 5", "34 if $m$ is 5"),
        ("Answer: `$13$`", "13"),
        ("### Final Answer\n\n13\n", "13"),
        ("**Answer**\n$$13$$", "13"),
        ("#### Final Answer\n13", "13"),
        ("\\boxed{13}\n#### Final answer:\n", "13"),
        ("#### \nThe answer is 4", "4"),
        ("so the answer is $\\boxed{}$.", None),
        ("####", None),
        ("72", None),
        ("", None),
        ("</answer> <answer>", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("<think>\\boxed{1}</think>I do not know", None),
        ("\\boxed{1}</think>#### 2", "2"),  # the prompt opened it
        ("<think>#### 1", None),
        ("#### 1 <think> hm", None),
        ("<think>a</think>#### 1<think>b</think>#### 2", "2"),
        ("<think>a</think>#### 1<think>b", None),
    ],
)
def test_only_what_follows_the_thinking_counts(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1}", None),
        ("#### 1", None),
        ("\\boxed{1}</think>", None),
        ("\\boxed{1}</think>\\boxed{2}", "2"),
        ("a</think>#### 1<think>b", None),
    ],
)
def test_a_completion_that_begins_inside_of_thinking(text, answer):
    assert extract_answer(text, thinking=True) == answer


def test_a_box_that_repeats_a_later_one_in_another_form():
    text = "$\\boxed{0.5}$ or $\\boxed{1/2}$ or $\\boxed{3}$"
    assert extract_answer(text) == "0.5, 1/2, 3"
    assert extract_answer(text, same=same_answer) == stated_answer(text, same_answer) == "1/2, 3"


def test_few_boxes_are_compared():
    """Of 300 different boxes in a list each with 16, not 300 * 299 / 2 pairs."""
    calls = []
    boxes = ", ".join(f"\\boxed{{{i}}}" for i in range(300))
    found = extract_answer(boxes, same=lambda a, b: bool(calls.append((a, b))))
    assert found == ", ".join(map(str, range(300)))
    assert len(calls) < 300 * 17


@pytest.mark.parametrize(
    "text_of",
    [
        lambda n: "{" * 10 * n,
        lambda n: "}" * 10 * n,
        lambda n: "\\boxed{" * n,
        lambda n: "\\boxed{" * 3 * n + " " + "}" * 3 * n,
        lambda n: "\\boxed{}" * n,
        lambda n: "\\boxed{1},\\boxed{2}," * n,
        lambda n: "the answer: the sum " * n,
        lambda n: "# answer\n" * n,
        lambda n: "\\boxed{{" * n + "}" * 2 * n,
        lambda n: "\\boxed 7 " * n,
        lambda n: "<answer>" * n,
        lambda n: "</answer>" * n,
        lambda n: "####" * 2 * n,
        lambda n: "the answer is " * n,
        lambda n: "answer to " * n,
        lambda n: "answer" + " " * 10 * n,
        lambda n: "answer is $" + "a" * 10 * n,
        lambda n: "<think>" * n,
        lambda n: "<think></think>" * n,
    ],
)
def test_extraction_is_one_pass(text_of):
    assert_linear(lambda n: extract_answer(text_of(n)), 5000)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (72, "72"),
        (10**400, "1" + "0" * 400),
        (np.float32(0.1), "0.1"),
        (" 1/2", " 1/2"),
        ("48/2=24\n#### 24", "24"),
        ("so $\\boxed{1,000}$.", "1,000"),
        ("<answer>b</answer>", "b"),
        ("The answer", "The answer"),
    ],
)
def test_stated_answer(value, answer):
    assert answer_fault(value) is None
    assert stated_answer(value) == answer


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "is null"),
        (["72"], "is a list, not a number or text"),
        ({"a": 1}, "is a dict, not"),
        (True, "is a bool, not"),
        (float("nan"), "is not a finite number"),
        ("", "is blank"),
        (" \n", "is blank"),
        (" $ ", "nothing but punctuation"),
        ("so\n####", "holds '####' with nothing after it"),
        ("so \\boxed{}.", "has an empty \\boxed"),
    ],
)
def test_answer_faults(value, fault):
    assert fault in answer_fault(value)
    with pytest.raises(ValueError, match="`answer`") as error:
        stated_answer(value)
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (r"\(42\)", "42"),
        (r"\[ 42 \].", "42"),
        (r"$\(x\)$", "x"),
        (r"\(\)", ""),
        (r"\(", r"\("),
        (r"\)", r"\)"),
        ("**42**:", "42"),
    ],
)
def test_what_surrounds_an_answer_is_left_out(text, bare):
    assert strip(text) == bare


def test_boxes_stand_together_by_all_that_is_between():
    """Also by a separator at the very beginning, or at the very end."""
    for between in (";" + "x" * 38, "x" * 38 + ";"):
        assert extract_answer(r"\boxed{1}" + between + r"\boxed{2}") == "1, 2"
