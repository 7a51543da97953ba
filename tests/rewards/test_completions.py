import pytest

from grpo_jax.rewards.completions import (
    after_thinking,
    begin_in_thinking,
    last_text_of,
    opens_thinking,
    text_of,
)
from grpo_jax.rewards.exact import exact_answer
from grpo_jax.rewards.format import answer_format, think_format
from grpo_jax.rewards.text import exact_match
from grpo_jax.rewards.votes import first_equal


def message(content, role="assistant"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        ([message("a")], "a"),
        ([message("a"), message("b")], "b"),
        ([message("a"), message("b", "tool")], "a"),
        ([{"content": "a"}], "a"),
        ([message(None)], ""),
        ([message([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], "ab"),
        ([message([{"type": "image"}, {"type": "text", "text": "b"}])], "b"),
        ([message("a", "user")], ""),
        ([], ""),
    ],
)
def test_text_of(completion, text):
    assert text_of(completion) == text


def test_text_of_refuses_other_things():
    with pytest.raises(TypeError, match="text or a list of messages"):
        text_of(3)


def test_last_text_of():
    assert last_text_of("a") == "a"
    assert last_text_of([message("a", "system"), message("b", "user")]) == "b"
    assert last_text_of([]) == ""


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("a<think>", True),
        ("a<think>\nLet me", True),
        ("a<think></think>", False),
        ("a<think></think><think>", True),
        ("Write <think> and </think>.<assistant>", False),
        ("a", False),
    ],
)
def test_a_prompt_that_leaves_thinking_open(text, is_open):
    assert opens_thinking(text) == is_open
    assert begin_in_thinking([[message("a", "user")]], [text]) == [is_open]


def test_without_rendered_prompts_only_the_end_of_a_prompt_opens_thinking():
    prompts = ["2 + 3?<think>\n", [message("a", "user"), message("<think>")], "Use <think>. 2 + 3?"]
    assert begin_in_thinking(prompts, None) == [True, True, False]


@pytest.mark.parametrize(
    ("text", "thinking", "rest"),
    [
        ("a", False, "a"),
        ("a", True, None),
        ("a</think>b", True, "b"),
        ("a</think>b", False, "b"),
        ("<think>a</think>b<think>", False, None),
        ("<think>a", False, None),
    ],
)
def test_after_thinking(text, thinking, rest):
    assert after_thinking(text, thinking) == rest


@pytest.mark.parametrize(
    "function", [answer_format, think_format, exact_answer, exact_match, first_equal]
)
@pytest.mark.parametrize("given", [{}, {"rendered_prompts": ["a"]}])
def test_a_prompt_that_lacks_is_noticed(function, given):
    """Fewer prompts than completions would be fewer rewards."""
    prompts = ["a"] * (1 + bool(given))
    columns = {"answer": ["1", "1"], "sample": [0, 1], "reward": "exact_answer"}
    with pytest.raises(ValueError, match="shorter"):
        function(prompts, ["#### 1", "#### 2"], **columns, **given)
