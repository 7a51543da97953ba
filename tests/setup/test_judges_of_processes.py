"""Judges of a run of two processes: who asks, how often, and what a resumed run finds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import stub_judge
from mistakes import TINY
from stub_judge import StubJudge, completion
from together import Together

from grpo_jax.config import loading
from grpo_jax.data.problems import Problem
from grpo_jax.environments.rewarding import RewardCollector
from grpo_jax.rewards.pool import Pool
from grpo_jax.setup import judges, rewards

RUBRIC = """
task = "Judge it."
[[criteria]]
name = "good"
ask = "Is it good?"
scale = [1, 1000000]
"""
PROMPTS = ["a?", "a?", "b?", "c?"]  # the even ones are process 0's; the first two are one problem
TEXTS = [["x", "yy", "x"], ["x", "zz", "z"], ["x", "yy", "w"], ["x", "v", "vv"]]
CALLS = {("a?", 0): 2, ("a?", 1): 3, ("b?", 0): 3, ("c?", 1): 3}  # texts of a problem, each once


def score(folder, url, num, texts=TEXTS):
    """The scores that each of `num` processes has in the end; groups are dealt in turn."""
    rubric = folder / "rubric.toml"
    rubric.write_text(RUBRIC)
    options = {"rewards.names": f"['judge:{rubric}']", "rewards.weights": "[1.0]"}
    options |= {"judge.base_url": url, "judge.model": "m"}
    config = loading.load(str(TINY), [f"--config.{n}={v}" for n, v in options.items()])
    found = rewards.load_rewards(config)
    policy = SimpleNamespace(text=lambda ids: "".join(map(chr, ids)))
    problems = [Problem(prompt, {}, "here") for prompt in PROMPTS]

    def work(number):
        with Pool(found, host=judges.start(config, found, folder)) as pool:
            collector = RewardCollector(pool, policy, problems, PROMPTS, len(texts[0]))
            for p in range(number, len(PROMPTS), num):
                collector.add(p, [[ord(c) for c in text] for text in texts[p]])
            return collector.scores()

    with pytest.MonkeyPatch.context() as patch:
        return Together(patch, num).run(work)


def asked(stub, since=0):
    """How often each text was judged, by problem and text."""
    told = {}
    for body in stub.requests[since:]:
        question = body["messages"][1]["content"]
        (prompt,) = {p for p in PROMPTS if f"\n{p}\n" in question}
        pair = prompt, stub_judge.answers(body)[0]
        told[pair] = told.get(pair, 0) + 1
    return told


def whimsical(body, i):
    """Another verdict each time that it is asked."""
    return completion(f"VERDICT-{stub_judge.number(body)}: good={i + 1}", 10, 1)


def test_each_process_asks_for_its_own_groups_and_a_resumed_run_for_none(tmp_path):
    with StubJudge(whimsical) as stub:
        both = score(tmp_path, stub.url, 2)
        for scores in both:
            np.testing.assert_array_equal(scores.reward_B, both[0].reward_B)
            assert scores.sums["judge/calls"] == len(stub.requests) == sum(CALLS.values())
        value_PG = both[0].reward_B.reshape(4, 3)
        assert not np.isnan(value_PG).any() and value_PG[0, 0] == value_PG[0, 2]
        # Two processes have the same problem: each asks for itself, and once.
        assert {n for pair, n in asked(stub).items() if pair != ("a?", "x")} == {1}
        assert asked(stub)["a?", "x"] == 2 and value_PG[0, 0] != value_PG[1, 0]
        files = [tmp_path / name for name in ("judgements.jsonl", "judgements-1.jsonl")]
        assert [len(file.read_text().splitlines()) for file in files] == [5, 6]
        # Both are killed within a line. The groups' verdicts are those that their process had.
        for file in files:
            with file.open("a") as opened:
                opened.write('{"key": "torn')
        for scores in score(tmp_path, stub.url, 2):
            np.testing.assert_array_equal(scores.reward_B, both[0].reward_B)
            assert scores.metrics["judge/cached_share"] == (12, 12)
            assert scores.sums["judge/calls"] == 0
        # What is judged after the torn lines is found, too, and by any number of processes.
        more = [[f"{text}!" for text in group] for group in TEXTS]
        then = score(tmp_path, stub.url, 2, more)
        since = len(stub.requests)
        assert since == 2 * sum(CALLS.values())
        np.testing.assert_array_equal(
            score(tmp_path, stub.url, 2, more)[0].reward_B, then[0].reward_B
        )
        score(tmp_path, stub.url, 1, TEXTS), score(tmp_path, stub.url, 3, more)
        assert len(stub.requests) == since
