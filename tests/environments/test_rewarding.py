"""What reward functions are given of a rollout, and what the terminal hears of their failures."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax.data.problems import Problem
from grpo_jax.environments import rewarding
from grpo_jax.environments.rewarding import FailureReports, RewardCollector, tokens_up_to
from grpo_jax.rewards import trial
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.registry import load
from grpo_jax.rewards.scores import Failure, Scores, select

CHAT = [{"role": "user", "content": "hi"}]
STATE = {"global_step": 0, "max_steps": 9, "epoch": 0.0}


class _Policy:
    def text(self, ids):
        return "".join("abc."[i] for i in ids)


def seen(prompts, completions, completion_ids, level, trainer_state, **columns):
    """A number that tells what arrived."""
    values = []
    for prompt, completion, ids, base in zip(prompts, completions, completion_ids, level):
        text = completion if isinstance(prompt, str) else completion[0]["content"]
        assert isinstance(prompt, str) or completion[0]["role"] == "assistant"
        assert len(text) == len(ids)
        values.append(base + len(text) + 0.5 * (not isinstance(prompt, str)))
    return [v + trainer_state.global_step for v in values]


def rendered(prompts, completions, rendered_prompts, **columns):
    return [float(text.endswith("<think>\n")) for text in rendered_prompts]


def test_groups_may_finish_in_any_order():
    problems = [Problem("p", {"level": 10}), Problem(CHAT, {"level": 20})]
    with Pool(load(("test_rewarding:seen",), (1.0,))) as pool:
        state = {"global_step": 100, "max_steps": 9, "epoch": 0.0}
        collector = RewardCollector(pool, _Policy(), problems, ["p", "chat"], 2, state)
        collector.add(1, [[0, 1, 3], [3]])
        collector.add(0, [[2, 3], [0, 0, 0, 0]])
        got = collector.scores()
    assert collector.texts() == ["c.", "aaaa", "ab.", "."]
    np.testing.assert_array_equal(got.reward_B, [112, 114, 123.5, 121.5])


def test_rewards_see_the_prompts_as_the_model_reads_them():
    problems = [Problem(CHAT, {"level": 0}), Problem(CHAT, {"level": 0})]
    texts = ["[user] hi [assistant]\n", "[user] hi [assistant]<think>\n"]
    with Pool(load(("test_rewarding:rendered",), (1.0,))) as pool:
        collector = RewardCollector(pool, _Policy(), problems, texts, 2)
        collector.add(1, [[3], [3]])
        collector.add(0, [[3], [3]])
        assert collector.scores().reward_B.tolist() == [0, 0, 1, 1]


def test_ensembles_are_computed_from_the_whole_step():
    """From a reward model and a function, of groups that finish in any order; for `trial`, too."""
    problems = [Problem("p", {"level": 10}), Problem("q", {"level": 20})]
    names = (
        "model:some/rm as m",
        "test_rewarding:seen as a",
        "ensemble:sum(of=['m', 'a'], scale='step') as both",
    )
    models = lambda problems, texts, group: {"m": np.array([3, 1, 4, 1], np.float32)}  # noqa: E731
    with Pool(load(names, (0.0, 0.5, 1.0)), models=models) as pool:
        collector = RewardCollector(pool, _Policy(), problems, ["p", "q"], 2, STATE)
        collector.add(1, [[0, 1, 3], [3]])
        collector.add(0, [[2, 3], [0, 0, 0, 0]])
        got = collector.scores()
        tried, _ = trial.score(pool, problems * 2, ["ab", "a"] * 2, [[1, 2], [1]] * 2, None, 1)
    assert list(got.by_name) == list(tried.by_name) == ["m", "a", "both"]
    m, a = np.array([3.0, 1, 4, 1]), np.array([12.0, 14, 23, 21])
    both = (m - m.mean()) / m.std() + (a - a.mean()) / a.std()
    np.testing.assert_allclose(got.by_name["both"], both, rtol=1e-5)
    np.testing.assert_allclose(got.reward_B, 0.5 * a + both, rtol=1e-5)
    assert not np.isnan(tried.reward_B).any() and not got.failures


class _Bytes:
    """Tokens of 1 to 3 bytes: a character may be in two tokens, and a token in two characters."""

    pieces = (b"1+1=2", b", ", b"2+", b"2=5", b"\xc3", b"\xa9", b"\xa93", b"\xe2\x89\x88")

    def text(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def test_the_ends_of_steps_in_tokens():
    ids = [0, 1, 2, 3, 4, 6, 0]
    text = _Bytes().text(ids)
    assert text == "1+1=2, 2+2=5é31+1=2"
    ends = list(range(len(text) + 1))
    want = [next(n for n in range(8) if _covers(ids[:n], text[:e])) for e in ends]
    assert tokens_up_to(ids, ends, _Bytes().text) == want
    assert want[5] == 1 and want[6] == 2 and want[13] == want[14] == 6 and want[-1] == 7


def _covers(ids, text):
    return b"".join(_Bytes.pieces[i] for i in ids).startswith(text.encode())


def test_steps_of_a_group_arrive_with_their_ends_in_tokens():
    """Of the reward that is asked for them. An evaluation keeps none, a failed call has none."""
    problems = [Problem("p", {}), Problem("q", {})]
    names = ("right_steps as chain", "right_steps as other", "odd_rewards:odd_steps")
    rewards = load(names, (1.0, 1.0, 0.0), by_step=("chain", "odd_steps"))
    with Pool(rewards) as pool:
        found = []
        for state in (STATE, None):
            collector = RewardCollector(pool, _Bytes(), problems, ["p", "q"], 2, state)
            collector.add(1, [[4, 6], [0, 1, 0]])
            collector.add(0, [[0, 1, 2, 3], [4, 5]])
            found.append(collector.scores())
        assert not found[1].steps
        chain = [[[1, 1.0], [4, 0.0]], [], [], [[1, 1.0], [3, 1.0]]]
        assert found[0].steps == {"chain": chain}  # the odd one's texts are no steps
        assert found[0].failed["odd_steps"].all()
        told = [found[0], Scores.from_json(found[0].as_json())]
        assert told[1].steps == {"chain": chain}
        picked = select([(told[0], np.array([3])), (found[1], np.array([0]))])
        assert picked.steps == {"chain": [chain[3], None]}
        said = {
            "[[(1, 1.0), (1, 0.0)]]": "ends of steps that rise",
            "[[(1, 1.0)], []]": "the steps of 2 completions, and there are 1",
            "[[(1, 1e999)]]": "finite values",
        }
        for text, why in said.items():
            got = pool.score(["p"], [text], {})
            assert got.failed["odd_steps"].all() and why in got.failures[0].message, got.failures
        assert pool.score(["p"], ["[[(2, 0.5)]]"], {}).steps["odd_steps"] == [[[2, 0.5]]]


def test_a_group_that_is_missing_is_noticed():
    with Pool(load(("test_rewarding:seen",), (1.0,))) as pool:
        collector = RewardCollector(pool, _Policy(), [Problem("p", {"level": 1})], ["p"], 1)
        with pytest.raises(AssertionError, match="did not finish"):
            collector.scores()


def _scores(failed, **more):
    failed_B = np.array(failed)
    failures = tuple(Failure("r", int(i), "error", "It broke.") for i in np.flatnonzero(failed_B))
    nan_B = np.where(failed_B, np.nan, 1.0)
    return Scores(nan_B, {"r": nan_B}, {"r": failed_B}, {"r": nan_B}, failures, **more)


def test_what_failed_for_groups_alone_is_told(monkeypatch):
    said = []
    monkeypatch.setattr(rewarding, "say", said.append)
    FailureReports().tell("step 1", _scores([False, False], retried={"r": (3, "It broke.")}))
    assert "step 1: 3 calls of the reward 'r' failed for a group" in said[0]
    assert said[0].endswith("It broke.")


def test_reports_become_rare(monkeypatch):
    said = []
    monkeypatch.setattr(rewarding, "say", said.append)
    reports = FailureReports()
    reports.tell("step 0", _scores([False, False]))
    assert not said
    for step in range(1, 9):
        reports.tell(f"step {step}", _scores([True, False]))
    assert [line.split(":")[1] for line in said] == [" step 1", " step 2", " step 4", " step 8"]
    assert "1 of 2 completions have no reward 'r'" in said[0] and "It broke." in said[0]
