import pytest

from grpo_jax.rewards.completions import last_text_of, text_of


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
