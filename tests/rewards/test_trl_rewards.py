"""TRL's own reward functions, called as ours are: they need no adapter."""

import pytest

trl_rewards = pytest.importorskip("trl.rewards", reason="needs trl")

RIGHT = "<think>3 - 1 = 2</think> So \\boxed{\\frac{1}{2}}"
WRONG = "3 - 1 = 2, so \\boxed{\\frac{1}{3}}"


def call(reward):
    """What the trainer passes: all by keyword, completions as messages, every column."""
    return reward(
        prompts=[[{"role": "user", "content": "Half?"}]] * 2,
        completions=[[{"role": "assistant", "content": text}] for text in (RIGHT, WRONG)],
        completion_ids=[[1, 2, 3, 4], [5] * 8],
        max_completion_tokens=8,
        solution=["$\\frac{1}{2}$", "$\\frac{1}{2}$"],
        answer=["1/2", "1/2"],
    )


def test_accuracy_reward():
    assert call(trl_rewards.accuracy_reward) == [1.0, 0.0]


def test_reasoning_accuracy_reward():
    assert call(trl_rewards.reasoning_accuracy_reward) == [1.0, 0.0]


def test_think_format_reward():
    assert call(trl_rewards.think_format_reward) == [1.0, 0.0]


def test_soft_overlong_punishment():
    reward = trl_rewards.get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)
    assert call(reward) == [0.0, -1.0]


def test_cosine_scaled_reward():
    # Right at half of 8 tokens: 0.5 + 0.5 * 0.5 * (1 + cos(pi / 2)). Wrong at the limit: the
    # shortest earns -1, the longest -0.5.
    reward = trl_rewards.get_cosine_scaled_reward(max_len=8)
    assert call(reward) == pytest.approx([0.75, -0.5])


def test_repetition_penalty_reward():
    # 2 trigrams, both unique; 6 trigrams, one unique: -(1 - 1/6)
    assert call(trl_rewards.get_repetition_penalty_reward()) == pytest.approx([0.0, -5 / 6])
