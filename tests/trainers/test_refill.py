"""Which groups of several draws a step learns from, with a real engine and rewards by tokens."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from grpo_jax.config import options as options_lib
from grpo_jax.data.problems import Problem
from grpo_jax.environments.demonstrations import NOTHING
from grpo_jax.environments.drawing import ONE_TURN
from grpo_jax.environments.questions import Questions
from grpo_jax.rewards import groups
from grpo_jax.rewards.registry import Reward
from grpo_jax.rewards.scores import Scores
from grpo_jax.setup.engine import make_engine
from grpo_jax.trainers import refill, rollout
from grpo_jax.trainers.guards import TooFewGroups
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Course

P, G, PER_DRAW, C = 4, 3, 3, 5
OPTIONS = {
    "prompts.drop_equal_groups": True,
    "prompts.per_draw": PER_DRAW,
    "batch.prompts": P,
    "batch.group": G,
    "rollout.max_tokens": C,
    "seed": 11,
}
REWARDS = [Reward("odd", "odd", 1.0)]
# Some are longer than the others, so that draws are padded differently.
PROMPTS = [[n] * 20 if n in (1, 2) else [2 + n, 3 + n] for n in range(10)]


ENGINE = tiny.MODEL, (1, 5, 17), tiny.one_device()


@functools.cache
def engine():
    return make_engine(_config(), *ENGINE)


def _config(**more):
    config = options_lib.default()
    for name, value in (OPTIONS | more).items():
        section, _, leaf = name.rpartition(".")
        (config[section] if section else config)[leaf] = value
    return config


class Pool:
    """Rewards completions whose first token is odd, of some problems."""

    rewards = functions = REWARDS
    models = None

    def __init__(self, solvable):
        self.solvable = solvable

    def submit(self, prompts, completions, columns, *, completion_ids, **more):
        can = columns["number"][0] in self.solvable
        odd_B = np.array([can and ids[0] % 2 for ids in completion_ids], np.float32)
        none_B = np.zeros(len(odd_B), bool)
        scores = Scores(odd_B, {"odd": odd_B}, {"odd": none_B}, {"odd": odd_B})
        return SimpleNamespace(result=lambda: scores)


def _run(solvable=range(10), **more):
    problems = [Problem("", {"number": n}, f"line {n}") for n in range(len(PROMPTS))]
    run = SimpleNamespace(
        config=_config(**more),
        course=Course(100, P),
        mesh=tiny.one_device(),
        train=Questions(problems, PROMPTS, [f"prompt {n}" for n in range(len(PROMPTS))]),
        engine=engine(),
        policy=SimpleNamespace(text=lambda ids: str(list(ids))),
        rewards=Pool(solvable),
        weights=lambda train: train.params,
        demonstrations=NOTHING,
        drawing=ONE_TURN,
    )
    monitor = SimpleNamespace(
        log=SimpleNamespace(close=lambda: None, closed_at=0.0),
        alive=lambda: None,
        checked=[],
        check_rewards=lambda state, scores: monitor.checked.append(scores),
    )
    state = RunState(step=2, passed_over=3)
    state.train = SimpleNamespace(params=tiny.params())
    return run, state, monitor


def _drawn(run, state, monitor, number):
    """A draw by itself, with its scores."""
    drawn = rollout.draw(
        run, state, 2, number, run.engine.publish(state.train.params), monitor.log, lambda: None
    )
    return drawn, drawn.rewards.scores()


def test_the_first_groups_with_a_gradient_are_learned_from():
    run, state, monitor = _run()
    sampled = refill.sample(run, state, monitor)
    assert state.passed_over == 3  # what a stop saves before the rewards are known for good
    kept, widths = [], set()
    for number in range(5, 5 + sampled.draws.number):  # step 2 has draw 2 + 3, then those after it
        drawn, scores = _drawn(run, state, monitor, number)
        widths.add(drawn.completions.prompt_PQ.shape[1])
        varies_P = groups.vary(scores.reward_B.reshape(PER_DRAW, G))
        kept += [(drawn, p) for p in np.flatnonzero(varies_P)]
    assert len(kept) >= P and len(widths) == 2  # else nothing was padded
    assert sampled.draws.num_equal == PER_DRAW * sampled.draws.number - len(kept) > 0
    reward_PG = sampled.rewards.scores().reward_B.reshape(P, G)
    for p, (drawn, q) in enumerate(kept[:P]):
        ours, theirs = sampled.completions, drawn.completions
        for name in ("completion_PGC", "logp_PGC", "length_PG", "stopped_PG", "prompt_length_P"):
            np.testing.assert_array_equal(getattr(ours, name)[p], getattr(theirs, name)[q])
        assert sampled.problem_P[p] == drawn.problem_P[q]
        assert sampled.questions.problems[p] is drawn.questions.problems[q]
        prompt = PROMPTS[sampled.problem_P[p]]
        assert ours.prompt_PQ[p, : len(prompt)].tolist() == prompt
        assert sampled.rewards.texts([p]) == drawn.rewards.texts([q])
        assert reward_PG[p].tolist() == (ours.completion_PGC[p, :, 0] % 2).tolist()
    longest = max(len(PROMPTS[n]) for n in sampled.problem_P)
    assert sampled.completions.prompt_PQ.shape[1] == run.engine.padded(longest)
    state.count_draws(sampled)
    assert state.draw_of(3) == 5 + sampled.draws.number


BEGUN = 5  # of 3 x 1.5


@functools.cache
def wide_engine():
    """Slots for all that over-sampling begins."""
    return make_engine(_config(**{"prompts.per_draw": BEGUN}), *ENGINE)


def test_of_the_groups_of_a_draw_those_that_finish_first_are_learned_from():
    run, state, monitor = _run(**{"prompts.oversample": 1.5})
    plain, *_ = _run(**{"prompts.per_draw": BEGUN})
    run.engine = plain.engine = wide_engine()
    for number in range(5, 40):  # to one in which not the first are the first to finish
        whole, of_whole = _drawn(plain, state, monitor, number)
        longest_P = whole.completions.length_PG.max(axis=1)
        kept = sorted(sorted(range(BEGUN), key=lambda p: (longest_P[p], p))[:PER_DRAW])
        if kept != [0, 1, 2]:
            break
    assert kept != [0, 1, 2]
    drawn, scores = _drawn(run, state, monitor, number)
    for name in ("completion_PGC", "length_PG", "stopped_PG", "prompt_length_P"):
        ours, theirs = getattr(drawn.completions, name), getattr(whole.completions, name)
        np.testing.assert_array_equal(ours, theirs[kept])
    assert drawn.problem_P.tolist() == [whole.problem_P[p] for p in kept]
    assert drawn.questions.problems == [whole.questions.problems[p] for p in kept]
    assert drawn.rewards.texts([1]) == whole.rewards.texts([kept[1]])
    reward_PG = of_whole.reward_B.reshape(BEGUN, G)
    np.testing.assert_array_equal(scores.reward_B.reshape(PER_DRAW, G), reward_PG[kept])
    left = [p for p in range(BEGUN) if p not in kept]
    lengths = whole.completions.prompt_length_P[left]
    np.testing.assert_array_equal(drawn.given_up.prompt_length_N, lengths)
    assert (0 < drawn.given_up.length_NG).all()
    assert (drawn.given_up.length_NG <= whole.completions.length_PG[left]).all()


def test_draws_are_refilled_from_what_finished_first():
    run, state, monitor = _run(**{"prompts.oversample": 1.5})
    run.engine = wide_engine()
    sampled = refill.sample(run, state, monitor)
    drawn = [_drawn(run, state, monitor, 5 + n)[0] for n in range(sampled.draws.number)]
    asked = np.concatenate([one.problem_P for one in drawn])
    np.testing.assert_array_equal(sampled.draws.problem_N, asked)
    given_up = np.concatenate([one.given_up.length_NG for one in drawn])
    np.testing.assert_array_equal(sampled.given_up.length_NG, given_up)
    assert len(given_up) == 2 * sampled.draws.number
    assert groups.vary(sampled.rewards.scores().reward_B.reshape(P, G)).all()


def test_truncated_completions_give_no_gradient_where_they_are_masked():
    """A group of which none stopped is dropped then, though its rewards differ."""
    few = refill.sample(*_run())
    assert not few.completions.stopped_PG.any(axis=1).all()
    masked = refill.sample(*_run(**{"algorithm.mask_truncated": True}))
    assert masked.completions.stopped_PG.any(axis=1).all()


def test_too_few_groups_end_the_run_or_fill_the_batch():
    more = {"prompts.max_draws": 4}
    run, state, monitor = _run(solvable=range(2), **more)
    with pytest.raises(TooFewGroups) as info:
        refill.sample(run, state, monitor)
    message = str(info.value)
    assert message.startswith("Step 3: prompts.max_draws = 4 draws of 3 prompts gave ")
    assert "between 0 and 1" in message and "batch.prompts = 4" in message
    assert len(monitor.checked) == 1  # failed rewards may be the reason, and are told of first

    filled = refill.sample(*_run(solvable=range(2), **more, **{"prompts.if_short": "fill"}))
    varies_P = groups.vary(filled.rewards.scores().reward_B.reshape(P, G))
    assert filled.draws.number == 4 and 0 < varies_P.sum() == 12 - filled.draws.num_equal < P
    assert filled.completions.length_PG.shape == (P, G)
