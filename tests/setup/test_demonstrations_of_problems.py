"""Demonstrations as tokens, and a teacher's tokens: what is taken, and what is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
from valid_config import valid

from grpo_jax.algorithm.hybrid_loss import HybridLoss
from grpo_jax.algorithm.hybrid_methods import METHODS
from grpo_jax.data import tasks
from grpo_jax.data.problems import Problem
from grpo_jax.environments.demonstrations import NOTHING
from grpo_jax.setup import demonstrations, learner, model, teacher

ARITHMETIC = tasks.load("arithmetic")
TOKENIZER = ARITHMETIC.make_tokenizer()


def problem(number: int, **columns) -> Problem:
    return Problem("1+2=", {"answer": "3", **columns}, f"rows.jsonl, line {number}")


def loaded(problems: list[Problem], **changes):
    config = valid(**{"hybrid__method": "hpt", "rollout__max_tokens": 40, **changes})
    return demonstrations.load(config, model.new(config.model, TOKENIZER), problems)


def test_a_demonstration_is_its_text_and_the_stop_token():
    message = [{"role": "assistant", "content": "#### 3"}]
    found = loaded([problem(1, completion="1+2=3"), problem(2, completion=message)])
    texts = [TOKENIZER.decode(ids[:-1]) for ids in found.ids]
    assert texts == ["1+2=3", "#### 3"]
    assert {ids[-1] for ids in found.ids} == {TOKENIZER.eos_token_id}
    assert found.hint_share is None and found.limit == 40
    hinted = loaded([problem(1, completion="1+2=3")], hybrid__method="uft")
    assert hinted.hint_share(299) == pytest.approx(0.05) and hinted.hint_share(300) == 0
    for method in ("", "positive_nll"):
        assert loaded([problem(1)], hybrid__method=method) is NOTHING


def test_a_task_gives_its_worked_solutions_once():
    problems, _ = ARITHMETIC.generate(20, 0, 0)
    first, again = (loaded(problems).ids for _ in range(2))
    assert first == again and all(len(ids) > 2 for ids in first)
    other = loaded(problems, seed=1).ids
    assert other != first
    shown, _ = tasks.load("unseen_form").generate(20, 0, 0)
    found = loaded(shown, data__task="unseen_form").ids
    for one, ids in zip(shown, found):
        assert TOKENIZER.decode(ids[:-1]).endswith(f"#### {one.columns['answer']}")


def test_what_is_no_demonstration_is_refused_by_its_row():
    good = problem(1, completion="#### 3")
    with pytest.raises(ValueError, match=r"line 2 has no text as column `completion`; it has pro"):
        loaded([good, problem(2, completion=None)])
    with pytest.raises(ValueError, match=r"line 2: `completion`, the demonstration, is 3\."):
        loaded([good, problem(2, completion=3)])
    with pytest.raises(ValueError, match=r"rollout\.max_tokens = 40.*line 2 has 51 tokens"):
        loaded([good, problem(2, completion="1" * 50)])
    with pytest.raises(ValueError, match=r"2 of 2 problems lack one"):
        loaded([problem(i, completion="") for i in (1, 2)], hybrid__missing="policy")


def test_a_problem_without_one_may_be_trained_by_its_rewards(capsys):
    problems = [problem(1, completion="#### 3"), problem(2, completion=" ")]
    found = loaded(problems, hybrid__missing="policy")
    assert [bool(ids) for ids in found.ids] == [True, False]
    assert "1 of 2 problems have no demonstration" in capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_the_config_chooses_the_hybrid(name):
    config = valid(hybrid__method=name)
    made = learner.make_learner(config, tiny.MODEL, tiny.one_device())
    component = made.update.component
    assert isinstance(component, HybridLoss)
    assert component.hybrid == learner.hybrid_of(config)
    assert component.hybrid.nll_coef == METHODS[name].nll_coef
    assert [c.coefficient for c in made.controllers] == ["mix"] * METHODS[name].mixes
    if METHODS[name].nll:
        assert learner.hybrid_of(valid(hybrid__method=name, hybrid__nll_coef=0.0)).nll_coef == 0


def test_the_schedules_are_those_of_the_papers():
    changes = {"hybrid__mix_warmup_steps": 4, "hybrid__mix_decay_steps": 10}
    mix = learner.hybrid_of(valid(hybrid__method="chord", **changes)).mix
    found = [mix.at(step) for step in (0, 2, 4, 9, 14, 99)]
    assert found == pytest.approx([0, 0.45, 0.9, 0.475, 0.05, 0.05])
    hint = learner.hybrid_of(valid(hybrid__method="uft", hybrid__hint_steps=10)).hint
    found = [hint.at(step) for step in (4, 9, 10, 99)]  # the paper's t + 1 of T
    assert found == pytest.approx([0.5, 0.05, 0, 0])


# --- A teacher ------------------------------------------------------------------------------------


def test_another_tokenizer_or_vocabulary_is_refused(monkeypatch):
    config = valid(distill__teacher="some/teacher")
    policy = model.new(config.model, TOKENIZER)

    def given(other):
        monkeypatch.setattr(teacher.policy_lib, "read", lambda path, option: other)
        return teacher.read(config, policy)

    assert given(policy).model == policy.model
    more = ARITHMETIC.make_tokenizer()
    more.add_tokens(["x"])
    with pytest.raises(ValueError, match=r"another tokenizer.*1 tokens differ, such as 'x', which"):
        given(dataclasses.replace(policy, tokenizer=more))
    wide = dataclasses.replace(policy.model, vocab_size=64)
    with pytest.raises(ValueError, match=r"vocabulary of 64 entries.*one of 20"):
        given(dataclasses.replace(policy, model=wide))
    assert teacher.read(valid(), policy) is None
