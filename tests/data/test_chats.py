"""Chats in the forms that data sets have them in, and as templates take them."""

import json

import pytest

from grpo_jax.data import chats

ASKED = [{"role": "user", "content": "1+1?"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Ulm"}}}


def part(text, **more):
    return {"type": "text", "text": text, **more}


# --- Messages as text -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [json.dumps(ASKED), f" {json.dumps(ASKED)}\n", repr(ASKED)])
def test_a_text_that_spells_out_messages_is_none(text):
    assert chats.in_text(text) == ASKED


@pytest.mark.parametrize(
    "text",
    ["What is a role?", "[1, 2] has the role of a list", "[]", "[role", '["role"]', "[[role] {}]"],
)
def test_other_texts_stay(text):
    assert chats.in_text(text) == text


@pytest.mark.parametrize(
    "text", [json.dumps(ASKED)[:-1], "[{'role': 'user' 'content': array([1])}]"]
)
def test_messages_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match="list of messages written as text, and cannot be read"):
        chats.in_text(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("false", False), ("False", False), ("low", "low"), ("'3'", "3"), ("[1]", [1]), ("", "")],
)
def test_values_as_json_or_python(text, value):
    assert chats.literal(text) == value and type(chats.literal(text)) is type(value)


# --- What is taken, and as what -------------------------------------------------------------------


def test_null_is_left_out_at_every_depth_but_not_from_lists():
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": {"g": None}}}
    assert chats.without_nulls(value) == {"b": [{"d": 0}, None], "e": {"f": {}}}


def test_contents_are_texts():
    """Parts are joined by a line feed, as vLLM gives them to templates that take texts."""
    messages = [
        {"role": "user", "name": None, "content": [part("a", image=None), part("b")]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12"},
    ]
    assert chats.fault(messages) is None
    assert chats.plain(messages) == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "12"},
    ]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "holds no text"),
        ([{"role": "user", "content": [part(" ")]}], "holds no text"),
        (["hi"], "a str as message 0"),
        ([*ASKED, {"content": "a"}], "no text as `role` of message 1"),
        ([{"role": "user"}], "no text as `content` of message 0"),
        ([{"role": "user", "content": None, "tool_calls": []}], "no text as `content`"),
        ([{"role": "user", "content": [part("a"), {"type": "image"}]}], "'image' in `content`"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio' in `content`"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part without `text`"),
        ([{"role": "user", "content": ["a"]}], "'a' in `content` of message 0, and text alone"),
        ([*ASKED, {"role": "assistant", "tool_calls": [CALL]}], "ends in the assistant's tool"),
    ],
)
def test_what_is_wrong_with_messages(messages, words):
    assert words in chats.fault(messages)


# --- What rows give the template ------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"unit": None}}}


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["schemas", "text", "texts"]
)
def test_tools(tools):
    assert chats.given({"tools": tools, "answer": 1}, padded=False) == {"tools": [TOOL]}


def test_null_in_tools_is_data_but_where_a_file_adds_it():
    bare = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert chats.given({"tools": [TOOL]}, padded=True) == {"tools": [bare]}


def test_arguments_of_the_template():
    row = {"chat_template_kwargs": {"enable_thinking": False, "date": None}}
    assert chats.given(row, padded=False) == {"enable_thinking": False, "date": None}
    assert chats.given(row, padded=True) == {"enable_thinking": False}
    assert chats.given({"chat_template_kwargs": '{"a": true}'}, padded=False) == {"a": True}
    assert chats.given({"chat_template_kwargs": None, "tools": None}, padded=False) == {}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tools": ["search"]}, "`tools` is ['search']. It must be a list of JSON schemas"),
        ({"tools": "calculator"}, "`tools` is 'calculator'."),
        ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` is a list: [1]"),
        ({"chat_template_kwargs": {"messages": []}}, "has `messages`, which the program gives"),
        ({"chat_template_kwargs": {"tools": []}}, "Give tools in a column `tools`"),
    ],
)
def test_columns_of_another_form(columns, words):
    with pytest.raises(ValueError) as error:
        chats.given(columns, padded=False)
    assert words in str(error.value)
