import pytest

from grpo_jax.rewards.format import answer_format, think_answer_format, think_format


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


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>hm</think> 5", 1.0),
        ("<think>\nhm\n</think>\n5\n", 1.0),
        ("\n<think></think>5", 1.0),
        ("hm</think>5", 0.0),
        ("<think>hm</think>", 0.0),
        ("<think>hm</think> \n", 0.0),
        ("<think>hm 5", 0.0),
        ("So: <think>hm</think>5", 0.0),
        ("<think><think>hm</think>5", 0.0),
        ("<think>hm</think>5</think>", 0.0),
        ("<think>a</think>5<think>b</think>6", 0.0),
        ("</think><think>5", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(completion, reward):
    assert think_format([""], [completion]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>hm</think><answer>5</answer>", 1.0),
        ("<think>hm</think>\n<answer> 5 </answer>\n", 1.0),
        ("<think>hm</think>5", 0.0),
        ("<think>hm</think><answer> </answer>", 0.0),
        ("<think>hm</think><answer>5</answer> done", 0.0),
        ("<think>hm</think> so <answer>5</answer>", 0.0),
        ("<think>hm</think><answer>5</answer><answer>6</answer>", 0.0),
        ("<think><answer>5</answer></think>", 0.0),
        ("<answer>5</answer>", 0.0),
    ],
)
def test_think_answer_format(completion, reward):
    assert think_answer_format([""], [completion]) == [reward]


def test_the_prompt_may_open_the_thinking():
    opened = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "<think>\n"}]
    prompts = ["2 + 3?<think>\n", opened, "Use <think>. 2 + 3?"]
    completions = ["hm</think>5", [{"role": "assistant", "content": "hm</think>5"}], "hm</think>5"]
    assert think_format(prompts, completions, answer=["5"] * 3) == [1.0, 1.0, 0.0]
    # Opened twice.
    assert think_format(["<think>"], ["<think>hm</think>5"]) == [0.0]


def test_the_rendered_prompt_may_open_the_thinking():
    """Under a chat template that does, which the messages do not show."""
    chat = [[{"role": "user", "content": "2 + 3?"}]] * 3
    rendered = ["2 + 3?<think>\n", "2 + 3?<think></think>", "2 + 3?<think>Let us see"]
    completions = ["hm</think>5", "hm</think>5", "hm 5"]
    assert think_format(chat, completions, rendered_prompts=rendered) == [1.0, 0.0, 0.0]
    tagged = ["hm</think><answer>5</answer>"] * 3
    assert think_answer_format(chat, tagged, rendered_prompts=rendered) == [1.0, 0.0, 1.0]
    marked = ["hm\n#### 5", "hm\n#### 5", "hm</think>\n#### 5"]
    assert answer_format(chat, marked, rendered_prompts=rendered) == [0.0, 1.0, 1.0]
    assert answer_format([""], ["<think>hm\n#### 5"]) == [0.0]
