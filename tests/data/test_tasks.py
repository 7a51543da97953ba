"""The generated sums: right answers, honest held-out set, demonstrations of both kinds."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import loading
from grpo_jax.data import tasks
from grpo_jax.data.streams import stream
from grpo_jax.data.tasks import arithmetic
from grpo_jax.rewards.exact import exact_answer
from grpo_jax.rewards.format import answer_format

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"


@pytest.fixture(scope="module")
def problems():
    return arithmetic.generate(600, 200, seed=3)


def running_totals(prompt: str) -> list[int]:
    terms = [int(t) for t in re.findall(r"[+-]?\d+", prompt.removesuffix("="))]
    return list(np.cumsum(terms))


def test_answers_are_the_sums(problems):
    for problem in [*problems[0], *problems[1]]:
        totals = running_totals(problem.prompt)
        assert str(totals[-1]) == problem.columns["answer"]
        assert 0 <= min(totals) and max(totals) <= arithmetic.MAX_TOTAL
    lengths = {len(running_totals(problem.prompt)) for problem in problems[0]}
    assert lengths == {4, 5}


def test_every_problem_has_a_name(problems):
    names = [problem.where for part in problems for problem in part]
    assert sorted(names) == sorted(f"task arithmetic, problem {i + 1}" for i in range(800))


def test_no_held_out_problem_is_trained_on(problems):
    train, held_out = ({p.prompt for p in part} for part in problems)
    assert len(train) == 600 and len(held_out) == 200
    assert not train & held_out


def test_problems_follow_from_the_seed():
    assert arithmetic.generate(20, 5, seed=1) == arithmetic.generate(20, 5, seed=1)
    assert arithmetic.generate(20, 5, seed=1) != arithmetic.generate(20, 5, seed=2)


def test_problems_of_a_seed_stay_the_same():
    """Else what a run has learned, and what is compared with it, would be of other problems."""
    train, held_out = arithmetic.generate(200, 50, seed=0)
    rng = stream(0, "solutions")
    solutions = [arithmetic.worked_solution(problem, rng) for problem in train]
    assert [p.prompt for p in train[:3]] == ["5+4-3+7-5=", "5-3-2+8-2=", "1+2+4-3="]
    for texts, known in (
        ([p.prompt for p in train + held_out], "2627aba048a931da"),
        (solutions, "141ae5462720c264"),
    ):
        assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == known


def test_a_slip_never_leaves_the_numbers_that_are_known(problems, monkeypatch):
    """None below 0, however far one slips; and 0 is one of them."""
    monkeypatch.setattr(arithmetic, "SHORTCUT", 0.0)
    monkeypatch.setattr(arithmetic, "SLIP", 1.0)
    rng = np.random.default_rng(0)
    texts = [arithmetic.worked_solution(problem, rng) for problem in problems[0][:300]]
    results = {int(n) for text in texts for n in re.findall(r"=(-?\d+)", text)}
    assert min(results) == 0


def test_careful_working_is_right(problems, monkeypatch):
    monkeypatch.setattr(arithmetic, "SHORTCUT", 0.0)
    monkeypatch.setattr(arithmetic, "SLIP", 0.0)
    for problem in problems[0][:50]:
        text = arithmetic.worked_solution(problem, np.random.default_rng(0))
        *lines, last = text.split("\n")
        assert [int(line.split("=")[1]) for line in lines] == running_totals(problem.prompt)[1:]
        assert last == f"#### {problem.columns['answer']}"


def test_students_are_sloppy(problems):
    """Guesses are mostly wrong and the majority; working is mostly right, not always."""
    rng = np.random.default_rng(0)
    texts = [arithmetic.worked_solution(p, rng) for p in problems[0]]
    answers = [p.columns["answer"] for p in problems[0]]
    prompts = [p.prompt for p in problems[0]]
    right = np.array(exact_answer(prompts=prompts, completions=texts, answer=answers))
    works = np.array(["\n" in text for text in texts])
    assert 0.3 < works.mean() < 0.5
    assert right[~works].mean() < 0.2 < 0.7 < right[works].mean() < 1.0
    assert all(answer_format(prompts=prompts, completions=texts))


def test_tokenizer_keeps_every_text_within_the_quickstarts_limits(problems):
    config = loading.load(str(QUICKSTART), [])
    tokenizer = arithmetic.make_tokenizer()
    rng = np.random.default_rng(1)
    for problem in problems[0]:
        text = arithmetic.worked_solution(problem, rng)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) < config.sft.max_tokens
        assert len(tokenizer(problem.prompt)["input_ids"]) <= config.data.max_prompt_tokens


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"data.task = 'algebra'.*Known: arithmetic"):
        tasks.load("algebra")
