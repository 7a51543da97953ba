import functools

import pytest

from grpo_jax.rewards.text import (
    exact_match,
    mentions,
    repetition_penalty,
    text_fault,
    token_f1,
    words_fault,
)


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The  Eiffel Tower.", "eiffel tower", 1.0),
        ("Eiffel-Tower", "eiffeltower", 1.0),  # SQuAD deletes punctuation, it does not split at it
        ("<think>in Rome?</think> Paris", "Paris", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("Paris", ["Rome", "paris"], 1.0),
        ("London", ["Rome", "Paris"], 0.0),
        ("A", "A", 1.0),
        ("the", "A", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_match(completion, answer, reward):
    assert exact_match([""], [completion], answer=[answer]) == [reward]
    assert exact_match([""], [chat(completion)], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        # 2 words in common; precision 2/3, recall 2/2: 2 * 2/3 / (5/3) = 4/5
        ("the red Eiffel tower", "Eiffel Tower", 4 / 5),
        # 1 in common of 3 and 2: 2 * 1/3 * 1/2 / (5/6) = 2/5
        ("cat sat down", "cat slept", 2 / 5),
        # a word twice is in common once: precision 1/2, recall 1
        ("no no", "no", 2 / 3),
        ("no no", "no no", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", ["dog", "cat sat", "fish"], 2 / 3),
    ],
)
def test_token_f1(completion, answer, reward):
    assert token_f1([""], [completion], answer=[answer]) == pytest.approx([reward])


@pytest.mark.parametrize("reward", [exact_match, token_f1])
@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "is null"),
        (3, "is a int, not a text"),
        ("", "is blank"),
        ("...", "all punctuation"),
        ([], "is an empty list"),
        (["a", None], "of which one is null"),
        (["a", ["b"]], "list of lists"),
    ],
)
def test_text_faults(reward, value, fault):
    assert fault in text_fault(value)
    assert reward.column_faults["answer"] is text_fault
    with pytest.raises(ValueError, match="`answer`"):
        reward([""], ["x"], answer=[value])
    assert text_fault("x") is None and text_fault(["x", "y"]) is None


def test_mentions():
    bound = functools.partial(mentions, words=["happy", "friend"])
    completions = ["A HAPPY friend.", "unhappy friends", "happy", chat("my friend, happy-go-lucky")]
    assert bound(prompts=[""] * 4, completions=completions) == [1.0, 0.0, 0.5, 1.0]
    # As many words as rows is still one list for all.
    assert bound(prompts=[""] * 2, completions=["happy", "friend"]) == [0.5, 0.5]


def test_mentions_from_a_column():
    words = [["sun", "moon"], [], ["C++", "ice cream"]]
    completions = ["The moon is up", "", "Ice cream and c++!"]
    assert mentions([""] * 3, completions, words=words) == [0.5, 1.0, 1.0]
    assert mentions([""], ["<think>sun</think>moon"], words=[["sun"]]) == [0.0]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "is null"),
        ("sun", "is a str, not a list of words"),
        (["sun", ""], "holds '', not a word"),
        (["sun", 3], "holds 3, not a word"),
    ],
)
def test_words_faults(value, fault):
    assert fault in words_fault(value)
    assert mentions.column_faults["words"](["sun"]) is None


def test_words_that_are_no_words_are_refused():
    with pytest.raises(ValueError, match="`words` holds 3"):
        mentions([""], ["x"], words=["sun", 3])


@pytest.mark.parametrize(
    ("text", "ngram", "value"),
    [
        ("a b c a b c", 3, -0.25),  # abc bca cab abc: 3 of 4 are distinct
        ("a A a", 1, -2 / 3),
        ("a b c d", 3, 0.0),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_penalty(text, ngram, value):
    reply = [{"role": "assistant", "content": text}]
    assert repetition_penalty(["p"] * 2, [text, reply], ngram) == pytest.approx([value] * 2)


def test_repetition_penalty_needs_words():
    with pytest.raises(ValueError, match="ngram = 0"):
        repetition_penalty(["p"], ["a"], 0)


@pytest.mark.parametrize(
    ("reward", "columns"),
    [
        (exact_match, {"answer": ["Paris"]}),
        (token_f1, {"answer": ["Paris"]}),
        (mentions, {"words": [["Paris"]]}),
    ],
)
def test_thinking_that_does_not_end_says_nothing(reward, columns):
    def value(completion, prompt):
        (value,) = reward([""], [completion], rendered_prompts=[prompt], **columns)
        return value

    assert value("Paris", "Where?") == 1.0
    assert value("Paris", "Where?<think>") == 0.0
    assert value("Rome?</think>Paris", "Where?<think>") == 1.0
    assert value("Paris?</think>Rome", "Where?<think>") == 0.0
    assert value("<think>Paris", "Where?") == 0.0
    assert reward(["Where?<think>"], ["Paris"], **columns) == [0.0]
