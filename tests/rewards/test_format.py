import pytest

from grpo_jax.rewards.format import answer_format


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("1 + 1 = 2\n#### 2", 1.0),
        ("1 + 1 = 2 #### 2", 1.0),
        ("#### wrong but well formed \n\n", 1.0),
        ("1 + 1 = 2", 0.0),
        ("####", 0.0),
        ("####  \n", 0.0),
        ("####\n2", 0.0),
        ("#### 2\nand more", 0.0),
        ("#### 1 #### 2", 0.0),
        ("#### 1\n#### 1", 0.0),
        ("##### 2", 0.0),
        ("", 0.0),
    ],
)
def test_answer_format(completion, reward):
    assert answer_format([""], [completion], answer=["2"]) == [reward]
