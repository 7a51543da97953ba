"""Contradictions of hybrids and of distillation are refused by name."""

from __future__ import annotations

import pytest
from valid_config import refusal_of, valid

from grpo_jax.config import derived, rules

PPO = {
    "algorithm__critic": True,
    "algorithm__baseline": "none",
    "algorithm__scale_by": "none",
}
REFUSED = [
    ({"hybrid__shaping": 0.2}, ["hybrid.shaping = 0.2", "'luffy'", "hybrid.method = ''"]),
    (
        {"hybrid__method": "hpt", "hybrid__mix_peak": 0.5},
        ["hybrid.mix_peak", "'chord'", "hybrid.method = 'hpt'", "Leave it at 0.9"],
    ),
    ({"hybrid__method": "positive_nll", "hybrid__missing": "policy"}, ["hybrid.missing"]),
    (
        {"hybrid__method": "luffy", "prompts__drop_equal_groups": True},
        ["prompts.drop_equal_groups", "luffy"],
    ),
    (
        {"hybrid__method": "srft", "algorithm__top_entropy_share": 0.2},
        ["algorithm.top_entropy_share = 0.2"],
    ),
    (
        {"hybrid__method": "chord", "hybrid__mix_valley": 0.95},
        ["hybrid.mix_valley = 0.95", "hybrid.mix_peak = 0.9"],
    ),
    (
        {"hybrid__method": "uft", "hybrid__hint_low": 0.9, "hybrid__hint_high": 0.5},
        ["hybrid.hint_low = 0.9", "hybrid.hint_high = 0.5"],
    ),
    (
        {
            "hybrid__method": "uft",
            "algorithm__baseline": "greedy",
            "algorithm__scale_by": "none",
        },
        ['algorithm.baseline = "greedy"', "hint"],
    ),
    ({"hybrid__method": "hpt", "distill__teacher": "t"}, ["hybrid.method", "distill.teacher"]),
    (
        {
            "hybrid__method": "hpt",
            "distill__teacher": "t",
            "rewards__names": (),
            "rewards__weights": (),
        },
        ["rewards.names = ()", "hpt"],
    ),
    ({"hybrid__method": "chord", **PPO}, ["algorithm.critic", "chord"]),
    ({"distill__teacher": "t", **PPO}, ["algorithm.critic", "distill.teacher"]),
    ({"distill__beta": 0.5}, ["distill.beta = 0.5", "distill.teacher"]),
    (
        {"distill__teacher": "t", "distill__loss": "reward", "distill__beta": 0.5},
        ["distill.beta = 0.5", "distill.loss = 'reward'"],
    ),
    ({"distill__teacher": "t", "rollout__top_k": 5}, ["rollout.top_k = 5", "distill.teacher"]),
    (
        {"distill__teacher": "t", "algorithm__ratio": "sequence"},
        ["algorithm.ratio", 'distill.loss to "reward"'],
    ),
    (
        {"distill__teacher": "t", "prompts__drop_equal_groups": True},
        ["prompts.drop_equal_groups", "distill.teacher"],
    ),
    (
        {
            "distill__teacher": "t",
            "rewards__names": (),
            "rewards__weights": (),
            "prompts__replay_share": 0.1,
        },
        ["pass rates", "prompts.replay_share"],
    ),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_contradictions_are_refused_by_name(changes, told):
    message = refusal_of(valid(**changes))
    for part in told:
        assert part in message


def test_a_teacher_needs_no_rewards():
    rules.check(valid(distill__teacher="t", rewards__names=(), rewards__weights=()))
    message = refusal_of(valid(rewards__names=(), rewards__weights=()))
    assert "at least one reward" in message and "distill.teacher" in message
    message = refusal_of(valid(distill__teacher="t", rewards__names=(), rewards__weights=(1.0,)))
    assert "rewards.weights 1" in message


def test_what_follows_from_a_method():
    assert derived.completions_per_prompt(valid()) == 8
    assert derived.completions_per_prompt(valid(hybrid__method="luffy")) == 9
    assert derived.completions_per_prompt(valid(hybrid__method="uft")) == 8
    plain, hinted = valid(), valid(hybrid__method="uft")
    more = derived.longest_row(hinted) - derived.longest_row(plain)
    assert more == hinted.rollout.max_tokens - 1
    assert derived.needs_old_pass(valid(distill__teacher="t", distill__loss="reward"))
    assert not derived.needs_old_pass(valid(distill__teacher="t"))
