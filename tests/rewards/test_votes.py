"""Votes: equal as the reward has it, in processes that can be killed."""

import functools
import time

import pytest

from grpo_jax.rewards import votes
from grpo_jax.rewards.exact import same_answer
from grpo_jax.rewards.math_answer import same_mathematics
from grpo_jax.rewards.pool import Limits
from grpo_jax.rewards.registry import load


@pytest.mark.parametrize(
    ("answers", "same", "expected"),
    [
        (["3", "4", "3"], same_answer, [0, 1, 0]),
        (["0.5", "7", r"\frac{1}{2}", "1/2", "7.0"], same_answer, [0, 1, 0, 0, 1]),
        (["Yes", None, "no", " yes"], same_answer, [0, -1, 2, 0]),
        ([None, None], same_answer, [-1, -1]),
        (["5 apples", "x=5", "5", "7", "7"], same_mathematics, [0, 0, 0, 3, 3]),
        (["5 apples", "x=5", "5", "7", "7"], same_answer, [0, 1, 2, 3, 3]),
        ([r"2\sqrt3", "3", r"\sqrt{12}"], same_mathematics, [0, 1, 0]),
    ],
)
def test_equal_answers_are_one_vote(answers, same, expected):
    assert votes.votes(answers, same).tolist() == expected


def test_votes_compare_few_answers():
    """300 answers, all different: not 300 * 299 / 2 comparisons. Equal texts remain one vote."""
    calls = []
    answers = [str(i) for i in range(300)] * 2
    found = votes.votes(answers, lambda a, b: bool(calls.append((a, b))))
    assert found.tolist() == list(range(300)) * 2
    assert len(calls) < 300 * 64


def test_whether_a_reward_reads_an_answer():
    assert votes.same_answer_of("math_answer") is same_mathematics
    assert votes.same_answer_of("exact_answer") is same_answer
    assert votes.same_answer_of('mentions(words=["little"])') is None


def hanging(prompts, completions, **columns):
    return [0.0] * len(completions)


def _hangs_on_nine(one, other):
    if "9" in one + other:
        time.sleep(60)
    return one == other


hanging.same_answer = _hangs_on_nine


def test_votes_are_counted_by_workers():
    """Thinking that the prompt opened holds no answer; boxes in another form are one."""
    (reward,) = load(("math_answer",), (1.0,))
    completions = [
        *("\\boxed{5 apples}", "\\boxed{4}", "#### 5", "none"),
        *("\\boxed{1}", "</think>\\boxed{2}", "</think>\\boxed{0.5} or \\boxed{1/2}", "#### 2"),
    ]
    rendered = ["a"] * 4 + ["b<think>"] * 4
    found = votes.count_votes(reward, rendered, completions, rendered, 4, Limits())
    assert found.tolist() == [[0, 1, 0, -1], [-1, 1, 2, -1]]


def test_a_comparison_without_end_costs_its_problem_only():
    (reward,) = load(("test_votes:hanging",), (1.0,))
    completions = ["#### 9", "#### 9", "#### 8", "#### 3", "#### 4", "#### 3"]
    count = functools.partial(votes.count_votes, reward, [""] * 6, completions, [""] * 6, 3)
    assert count(Limits(seconds=3.0, start_seconds=10.0)).tolist() == [[0, 1, 2], [0, 1, 0]]
