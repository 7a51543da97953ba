"""What is said of problems: repeats, held-out ones among the training ones, unread columns."""

import pytest

from grpo_jax.data import notes
from grpo_jax.data.problems import Form, Problem

CHAT = [{"role": "user", "content": "hi"}]


def texts(*prompts, **columns):
    return [Problem(p, {"answer": "1"} | columns) for p in prompts]


def test_different_problems_need_no_words():
    assert notes.of_problems(texts("a", "b"), texts("c"), Form()) == []


def test_repeats_are_counted():
    """Of a, b, a, c, a, b: three prompts, a three times; the answers of b differ."""
    train = [*texts("a", "b", "a", "c", "a"), Problem("b", {"answer": "2"})]
    [note] = notes.of_problems(train, [], Form())
    assert "the 6 training problems have 3 different prompts, one of them 3 times." in note
    assert "Of 1 prompts the other columns differ" in note


def test_one_question_with_other_tools_is_another():
    one, two = (Problem(CHAT, {}, arguments={"tools": [{"name": n}]}) for n in "ab")
    assert notes.of_problems([one, two], [], Form()) == []
    assert "1 different" in notes.of_problems([one, one], [], Form())[0]


def test_held_out_problems_among_the_training_ones():
    note, both = notes.of_problems(texts("a", "b", "c"), texts("b", "d", "b"), Form())
    assert "the 3 held-out problems have 2 different prompts" in note
    assert both.startswith("2 of the 3 held-out problems have the prompt of a training problem")


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (Form(), True),
        (Form(prompt_template="{question}"), False),
        (Form(prompt_template="{answer}"), True),
        (Form(("prompt=question.text",)), False),
    ],
)
def test_columns_that_look_like_the_question(form, told):
    problems = texts("a", question={"text": "b"}, messages=None)
    found = notes.of_problems(problems, [], form)
    assert [note.startswith("`question` is no part of the prompt") for note in found] == [
        True
    ] * told


def test_tools_belong_to_chats():
    columns = {"tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}}
    [note] = notes.of_problems([Problem("a", columns)], [], Form())
    assert note.startswith("`tools`, `chat_template_kwargs` are no part of the prompt")
    assert notes.of_problems([Problem(CHAT, columns)], [], Form()) == []


# --- The chat template ----------------------------------------------------------------------------

READS = frozenset({"messages", "add_generation_prompt", "documents", "enable_thinking"})


def test_an_argument_that_the_template_does_not_read_is_refused():
    form = Form(chat_template_kwargs=("enable_thinkin=False",))
    words = r"does not read `enable_thinkin`\. It reads `documents`, `enable_thinking`\."
    with pytest.raises(ValueError, match=words):
        notes.of_template([], READS, form)
    with pytest.raises(ValueError, match="It reads messages alone"):
        notes.of_template([], frozenset({"messages"}), form)
    assert notes.of_template([], READS, Form(chat_template_kwargs=("enable_thinking=1",))) == []


def test_what_the_data_gives_and_the_template_does_not_read():
    problems = [Problem(CHAT, {}, arguments={"tools": []}), Problem(CHAT, {})]
    [note] = notes.of_template(problems, READS, Form())
    assert note.startswith("the model's chat template does not read `tools`")


def test_what_the_template_reads_and_does_not_get():
    given = Problem(CHAT, {"documents": 1, "x": 2}, arguments={"documents": 1})
    assert notes.of_template([given], READS, Form()) == []
    [note] = notes.of_template([Problem(CHAT, {"documents": 1, "x": 2})], READS, Form())
    assert note.startswith("the model's chat template reads `documents`, and the data has")
    assert notes.of_template([Problem("a", {"documents": 1})], None, Form()) == []
