"""Metrics by hand, and the items on disk."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from grpo_jax.data.problems import Problem
from grpo_jax.environments import single_turn
from grpo_jax.environments.drawing import Conversations, OneTurn
from grpo_jax.environments.questions import Questions
from grpo_jax.evaluation import held_out
from grpo_jax.evaluation import tallies as tallies_lib
from grpo_jax.metrics.names import is_known
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.registry import load
from grpo_jax.setup.rewards import refuse_samples
from grpo_jax.structs import Rollouts


class _Policy:
    def text(self, ids):
        return "".join("#0123456789 "[i] for i in ids)


class _Engine:
    """Gives the completions that it is made with."""

    def __init__(self, texts: list[list[str]], stopped):
        self.texts, self.stopped, self.calls = texts, stopped, []

    def generate(
        self, params, prompts, *, group, key, temperature, on_group, meanwhile, on_harvest
    ):
        self.calls.append((prompts, group, temperature))
        length = np.array([[len(t) for t in row] for row in self.texts], np.int32)
        ids = np.full((*length.shape, length.max()), 11, np.int32)
        for p, g in np.ndindex(length.shape):
            row = ["#0123456789 ".index(c) for c in self.texts[p][g]]
            ids[p, g, : len(row)] = row
        for p, row in enumerate(length):
            on_group(p, [ids[p, g, :n].tolist() for g, n in enumerate(row)])
        zeros = np.zeros(ids.shape, np.float32)
        prompt = np.zeros((len(prompts), 1), np.int32)
        one = np.ones(len(prompts), np.int32)
        return Rollouts(prompt, one, ids, zeros, length, np.array(self.stopped))


QUESTIONS = Questions(
    [Problem("a", {"answer": "1"}), Problem("b", {"answer": "2"})], [[1], [2]], ["a", "b"]
)
SEVEN = ("#### 1", "#### 2", "#### 2", "#### 9", "#### 2", "#### 9")


def odd_lengths(prompts, completions, **columns):
    """2 or 0.5, and no opinion on what does not begin by "#"."""
    return [(2.0 if len(c) % 2 else 0.5) if c[0] == "#" else None for c in completions]


def right(prompts, completions, answer, **columns):
    return [float(c.endswith(a)) for c, a in zip(completions, answer)]


def always_fails(prompts, completions, **columns):
    raise ValueError("as asked")


def silent(prompts, completions, **columns):
    return [None] * len(completions)


@pytest.fixture(scope="module")
def pool():
    with Pool(load(("exact_answer", "test_held_out:silent"), (1.0, 1.0))) as pool:
        yield pool


def _run(engine, file, num_samples, pool, key=None, **more):
    return held_out.run(
        engine, None, _Policy(), QUESTIONS, pool,
        num_samples=num_samples, temperature=0.7, key=key, file=file, **more,
    )  # fmt: skip


class _InParts(OneTurn):
    """Draws few prompts at once, as conversations are; each draw has an engine of its own."""

    def __init__(self, most_at_once, *engines):
        self.most_at_once, self.engines, self.calls = most_at_once, list(engines), []

    def parts(self, num_prompts, group):
        return Conversations.parts(self, num_prompts, group)

    def draw(self, engine, *args, numbers, draw, held_out, key, **more):
        self.calls.append((list(numbers), draw, held_out, jax.random.key_data(key).tolist()))
        more |= {"numbers": numbers, "draw": draw, "key": key}
        return super().draw(self.engines.pop(0), *args, **more)


def test_an_evaluation_in_parts_is_that_of_all_at_once(tmp_path, pool):
    """But for the random keys, which the parts do not share."""
    texts, stopped = [list(SEVEN[:3]), list(SEVEN[3:6])], [[True] * 3, [False] * 3]
    engines = [_Engine(texts[i : i + 1], stopped[i : i + 1]) for i in range(2)]
    drawing, key = _InParts(5, *engines), jax.random.key(3)
    got = _run(None, tmp_path / "parts", 3, pool, drawing=drawing, key=key)
    assert got == _run(_Engine(texts, stopped), tmp_path / "whole", 3, pool)
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()
    (*one, first), (*two, second) = drawing.calls
    assert one == [[0], 0, True] and two == [[1], 1, True] and first != second
    assert first == jax.random.key_data(key).tolist()
    for most, parts in ((0, [[0], [1], [2]]), (7, [[0, 1], [2]]), (9, [[0, 1, 2]])):
        assert [list(part) for part in _InParts(most).parts(3, 3)] == parts


def test_greedy(tmp_path, pool):
    engine = _Engine([["#### 1"], ["#### 10"]], [[True], [False]])
    file, judged = tmp_path / "deep" / "e.jsonl", []
    values = _run(engine, file, 0, pool, on_scores=lambda s: judged.append((file.exists(), s)))
    assert [(there, s.reward_B.tolist()) for there, s in judged] == [(True, [1.0, 0.0])]
    assert values == {  # nothing of the reward that gave no number
        "eval/accuracy": 0.5, "eval/reward": 0.5, "eval/reward/exact_answer": 0.5,
        "eval/answer_found_share": 1.0, "eval/truncated_share": 0.5, "eval/length": 6.5,
    }  # fmt: skip
    assert all(map(is_known, values))
    assert engine.calls == [([[1], [2]], 1, 0.0)]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        {"prompt": "a", "columns": {"answer": "1"}, "sample": 0, "completion": "#### 1",
         "rewards": {"exact_answer": 1.0, "silent": None}, "answer": "1",
         "correct": True, "length": 6, "stopped": True},
        {"prompt": "b", "columns": {"answer": "2"}, "sample": 0, "completion": "#### 10",
         "rewards": {"exact_answer": 0.0, "silent": None}, "answer": "10",
         "correct": False, "length": 7, "stopped": False},
    ]  # fmt: skip


def test_samples(tmp_path, pool):
    texts = [list(SEVEN[:3]), list(SEVEN[3:])]  # right: 1 of 3, 1 of 3; votes: 2, then 9
    engine = _Engine(texts, [[True] * 3] * 2)
    values = _run(engine, tmp_path / "e.jsonl", 3, pool)
    assert values["eval/pass@3"] == 1.0  # each has a right one
    assert values["eval/mean@3"] == pytest.approx(1 / 3)
    assert values["eval/maj@3"] == 0.0
    assert engine.calls == [([[1], [2]], 3, 0.7)]
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["sample"], r["completion"]) for r in rows] == [
        (p, g, texts[i][g]) for i, p in enumerate("ab") for g in range(3)
    ]
    assert [r["rewards"]["exact_answer"] for r in rows] == [1, 0, 0, 0, 1, 0]


def test_votes_are_counted_by_problem(pool):
    texts = [["#### 1", "#### 1", "#### 2"], ["#### 1", "#### 2", "#### 1"]]
    values = _run(_Engine(texts, [[True] * 3] * 2), None, 3, pool)
    assert values["eval/maj@3"] == 0.5 and values["eval/mean@3"] == pytest.approx(3 / 6)


def test_votes_are_equal_as_the_reward_has_it():
    texts = [["#### 3", "#### 1", "#### 3"], ["#### 2", "#### 02", "#### 9"]]
    values = {}
    for name in ("math_answer", "test_held_out:right"):
        with Pool(load((name,), (1.0,), name)) as pool:
            values[name] = _run(_Engine(texts, [[True] * 3] * 2), None, 3, pool)
    assert values["math_answer"]["eval/maj@3"] == 0.5
    # A reward that reads no answer has nothing to vote for.
    assert set(values["test_held_out:right"]) == {*("eval/pass@3", "eval/pass^3", "eval/mean@3")}


def test_an_answer_inside_of_thinking_that_the_prompt_opened(pool):
    questions = Questions(QUESTIONS.problems, [[1], [2]], ["a<think>", "b"])
    args = (_Engine([["#### 1"], ["#### 2"]], [[True], [True]]), None, _Policy(), questions, pool)
    answered = single_turn.answer(*args, num_samples=0, temperature=0.0, key=None)
    assert answered.answers == [None, "2"]
    assert answered.scores.by_name["exact_answer"].tolist() == [0.0, 1.0]


def test_one_sample_is_not_the_greedy_one(tmp_path, pool):
    engine = _Engine([["#### 1"], ["#### 3"]], [[True], [True]])
    values = _run(engine, None, 1, pool)
    assert values == {"eval/pass@1": 0.5, "eval/maj@1": 0.5, "eval/mean@1": 0.5}
    assert engine.calls == [([[1], [2]], 1, 0.7)]


def test_without_a_right_or_wrong_there_is_no_accuracy(tmp_path):
    """A reward of any other numbers is logged as what it is."""
    with Pool(load(("test_held_out:odd_lengths",), (2.0,))) as pool:
        engine = _Engine([["#### 1"], ["#### 10"]], [[True], [True]])
        values = _run(engine, tmp_path / "e.jsonl", 0, pool)
    assert not [name for name in values if "accuracy" in name]
    assert values["eval/reward/odd_lengths"] == 1.25 and values["eval/reward"] == 2.5
    assert '"correct"' not in (tmp_path / "e.jsonl").read_text()


@pytest.mark.parametrize(
    ("names", "accuracy", "expected"),
    [
        (("answer_format", "math_answer", "exact_answer"), "", "math_answer"),  # the first that is
        (("answer_format", "exact_match"), "answer_format", "answer_format"),  # by the option
        (("test_held_out:silent",), "test_held_out:silent", "silent"),
        (("soft_overlong(buffer=3)", "test_held_out:silent"), "", None),
    ],
)
def test_which_reward_says_what_is_right(names, accuracy, expected):
    rewards = load(names, (1.0,) * len(names), accuracy)
    assert [r.name for r in rewards if r.gives_accuracy] == [expected] * bool(expected)


def test_a_reward_for_accuracy_that_is_not_there():
    with pytest.raises(ValueError, match=r"rewards.accuracy = 'right' is none of the rewards, wh"):
        load(("exact_answer",), (1.0,), "right")


def test_samples_need_a_right_and_a_wrong():
    rewards = load(("test_held_out:silent",), (1.0,))
    with pytest.raises(ValueError, match=r"evaluation.num_samples = 4 asks for .*rewards.accuracy"):
        refuse_samples(rewards, 4, "evaluation.num_samples")
    refuse_samples(rewards, 0, "evaluation.num_samples")


def test_accuracy_means_the_same_in_training_and_evaluation():
    """Of the completions that a reward applies to, those to which it gives 1; failed is wrong.

    But in training an unknown one does not count.
    """
    texts = [["#### 1"], ["12"]]  # lengths 6: 0.5, and none
    for name, expected in (("odd_lengths", 0.0), ("always_fails", 0.0), ("silent", None)):
        with Pool(load((f"test_held_out:{name}",), (1.0,), name)) as pool:
            engine = _Engine(texts, [[True], [True]])
            args = (engine, None, _Policy(), QUESTIONS, pool)
            answered = single_turn.answer(*args, num_samples=0, temperature=0.0, key=None)
            run = _run(_Engine(texts, [[True], [True]]), None, 0, pool)
        assert run.get("eval/failed_rewards") == (2.0 if name == "always_fails" else None)
        in_training = answered.scores.accuracy(name)
        in_evaluation = tallies_lib.greedy_tallies(answered, 8)["accuracy"].value
        if name == "always_fails":
            assert answered.scores.unknown_B.all() and np.isnan(in_training)
            least = dataclasses.replace(answered.scores, reward_B=np.zeros(2, np.float32))
            in_training = least.accuracy(name)
        np.testing.assert_array_equal(in_training, in_evaluation)
        np.testing.assert_array_equal(in_training, np.nan if expected is None else expected)


def test_no_answer_found(pool):
    values = _run(_Engine([["12"], ["#### 2"]], [[True], [True]]), None, 0, pool)
    assert values["eval/answer_found_share"] == 0.5 and values["eval/accuracy"] == 0.5


def test_lengths_of_the_stopped(pool):
    engine = _Engine([["#### 1"], ["#### 10"]], [[True], [False]])
    answered = single_turn.answer(
        engine, None, _Policy(), QUESTIONS, pool, num_samples=0, temperature=0.0, key=None
    )
    tallies = tallies_lib.greedy_tallies(answered, 8)
    assert tallies["stopped_length"].value == 6.0 and tallies["length"].value == 6.5
    assert (tallies["length"].low, tallies["length"].high) == (1.0, 8.0)
