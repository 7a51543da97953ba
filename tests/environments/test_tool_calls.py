"""Turns read from ids, in each format of calls: good ones, malformed ones, and what is no call."""

from __future__ import annotations

import chat_families
import pytest
from made_episodes import TOOLS

from grpo_jax.environments import call_formats
from grpo_jax.environments.call_formats import Format
from grpo_jax.environments.spelling import Spelling
from grpo_jax.environments.tool_calls import Reader
from grpo_jax.environments.turns import Call, Malformed

FORMATS = {
    "json": (call_formats.QWEN_JSON, chat_families.qwen),
    "xml": (call_formats.QWEN_XML, chat_families.qwen),
    "llama": (call_formats.LLAMA, chat_families.llama),
    "mistral": (call_formats.MISTRAL, chat_families.mistral),
    "args": (call_formats.MISTRAL_ARGS, chat_families.mistral),
}
STOP = {"json": "<|im_end|>", "xml": "<|im_end|>", "llama": "<|eot_id|>"}


@pytest.fixture(scope="module")
def readers():
    made = {}
    for name, (form, tokenizer) in FORMATS.items():
        spelling = Spelling(tokenizer()[0])
        made[name] = spelling, Reader(form, spelling, TOOLS)
    return made


def read(readers, name, text, stopped=True):
    spelling, reader = readers[name]
    return reader.read(spelling.full(text + STOP.get(name, "</s>") * stopped))


NESTED = '{"key": "say \\"hi\\" \\\\ 日本 🙂", "more": {"list": [1, -2.5e-3, null, true], "é": {}}}'
NESTED_VALUE = {
    "key": 'say "hi" \\ 日本 🙂',
    "more": {"list": [1, -2.5e-3, None, True], "é": {}},
}
GOOD = [  # format, text, calls
    ("json", '<tool_call>\n{"name": "look_up", "arguments": %s}\n</tool_call>', NESTED),
    ("json", '<tool_call>{"arguments": %s, "name": "look_up"}</tool_call>', NESTED),
    ("llama", '{"name": "look_up", "parameters": %s}', NESTED),
    ("llama", '<|python_tag|>{"parameters": %s, "name": "look_up"}', NESTED),
    ("mistral", '[TOOL_CALLS] [{"name": "look_up", "arguments": %s}]', NESTED),
    ("args", "[TOOL_CALLS]look_up[ARGS]%s", NESTED),
]


@pytest.mark.parametrize(("name", "text", "arguments"), GOOD)
def test_a_call_is_read_with_its_arguments(readers, name, text, arguments):
    turn = read(readers, name, text % arguments)
    assert turn.calls == (Call("look_up", NESTED_VALUE),)
    assert not turn.content and not turn.reasoning


def test_texts_of_tags_get_the_types_of_the_schema_and_keep_their_white_space(readers):
    text = (
        "<tool_call>\n<function=multiply>\n<parameter=a>\n12\n</parameter>\n"
        "<parameter=b>\n-0.5\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=look_up>\n<parameter=key>\n  12\n\tx\n\n</parameter>\n"
        '<parameter=more>\n{"a": [1]}\n</parameter>\n</function>\n</tool_call>'
    )
    assert read(readers, "xml", text).calls == (
        Call("multiply", {"a": 12, "b": -0.5}),
        Call("look_up", {"key": "  12\n\tx\n", "more": {"a": [1]}}),
    )


def test_names_that_the_model_gave_its_calls(readers):
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}, {"name": "g"}]'
    assert read(readers, "mistral", text).calls == (Call("f", {}, "abcdefghi"), Call("g", {}))


# Of each: a good call first, where the format has several, which must not be lost.
JSON_CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 1}}\n</tool_call>\n'
XML_CALL = (
    "<tool_call>\n<function=multiply>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
)
BAD = [
    ("json", JSON_CALL, '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>', "syntax"),
    ("json", JSON_CALL, "<tool_call>\nf(1)\n</tool_call>", "syntax"),
    ("json", JSON_CALL, "<tool_call>[3]</tool_call>", "syntax"),
    ("json", JSON_CALL, '<tool_call>{"name": "f", "arguments": {"a": "x', "unclosed"),
    ("json", JSON_CALL, '<tool_call>{"name": "f", "arguments": {}}', "unclosed"),
    ("json", JSON_CALL, '<tool_call>{"arguments": {}}</tool_call>', "name"),
    ("json", JSON_CALL, '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "name"),
    ("json", JSON_CALL, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "arguments"),
    ("json", JSON_CALL, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "arguments"),
    ("json", JSON_CALL, "<tool_call>" + "[" * 5000 + "</tool_call>", "syntax"),
    ("json", JSON_CALL, f'<tool_call>{{"name": "f", "a": {"9" * 5000}}}</tool_call>', "syntax"),
    (
        "xml",
        XML_CALL,
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function></tool_call>",
        "syntax",
    ),
    ("xml", XML_CALL, '<tool_call>{"name": "f"}</tool_call>', "syntax"),
    ("xml", XML_CALL, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>", "unclosed"),
    ("llama", "", '{"name": "f", "parameters": {"a": }}', "syntax"),
    ("llama", "", '{"name": "f", "parameters": {"a": "x', "unclosed"),
    ("llama", "", '{"parameters": {}}', "name"),
    ("llama", "", '{"name": "f"}', "arguments"),
    ("llama", "", '{"name": "f", "parameters": 3}', "arguments"),
    (
        "llama",
        '{"name": "multiply", "parameters": {"a": 1}}; ',
        '{"name": "f", "parameters": }',
        "syntax",
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "multiply", "arguments": {"a": 1}}, ',
        '{"name": "f" 3}',
        "syntax",
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "multiply", "arguments": {"a": 1}}, ',
        '{"name": "f',
        "unclosed",
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "multiply", "arguments": {"a": 1}}, ',
        '{"arguments": {}}]',
        "name",
    ),
    ("args", '[TOOL_CALLS]multiply[ARGS]{"a": 1}', '[TOOL_CALLS]f[ARGS]{"a": ', "unclosed"),
    ("args", '[TOOL_CALLS]multiply[ARGS]{"a": 1}', "[TOOL_CALLS]f(1)", "syntax"),
]


def _close(text):
    """Mistral's tokens write spaces after control tokens."""
    return text.replace(" ", "")


@pytest.mark.parametrize(("name", "good", "bad", "kind"), BAD)
def test_a_malformed_call_loses_only_itself(readers, name, good, bad, kind):
    turn = read(readers, name, good + bad, stopped=kind != "unclosed")
    *before, last = turn.calls
    assert before == [Call("multiply", {"a": 1})] * bool(good)
    assert isinstance(last, Malformed) and last.kind == kind
    assert last.reason.endswith(".") and len(last.reason) < 400
    assert last.text and last.text in turn.message["content"]
    assert _close(last.text) in _close(good + bad) and not (good and _close(good) in last.text)
    assert len(turn.message.get("tool_calls", ())) == len(before)


def test_a_good_call_after_a_malformed_one(readers):
    turn = read(readers, "json", "Well.<tool_call>{</tool_call> or " + JSON_CALL + "Done.")
    assert [type(call) for call in turn.calls] == [Malformed, Call]
    assert turn.content == "Well. or \nDone."
    turn = read(readers, "mistral", '[TOOL_CALLS] [{"name": f}, {"name": "g", "arguments": {}}]')
    assert turn.calls[1] == Call("g", {}) and turn.calls[0].kind == "syntax"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("json", JSON_CALL.strip()),
        ("xml", XML_CALL.strip()),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'),
        ("args", "[TOOL_CALLS]f[ARGS]{}"),
    ],
)
def test_text_that_spells_a_call_in_ordinary_tokens_is_no_call(readers, name, text):
    spelling, reader = readers[name]
    ids = spelling.plain(text)
    assert not spelling.control.keys() & set(ids)
    turn = reader.read(ids)
    assert not turn.calls and turn.content == text
    assert reader.read(spelling.full(text)).calls  # with the control tokens it is one


def test_a_spelled_end_does_not_end_a_call(readers):
    spelling, reader = readers["json"]
    inside = spelling.plain('{"name": "f", "arguments": {"a": "</tool_call>"}}')
    opened, closed = spelling.full("<tool_call>"), spelling.full("</tool_call><|im_end|>")
    assert reader.read(opened + inside + closed).calls == (Call("f", {"a": "</tool_call>"}),)


def test_calls_in_thinking_do_not_count(readers):
    text = f"<think>\nShould I {JSON_CALL.strip()}?\n</think>\n\nNo."
    turn = read(readers, "json", text)
    assert turn.content == "No." and not turn.calls
    assert turn.reasoning == f"Should I {JSON_CALL.strip()}?"
    assert turn.message == {
        "role": "assistant",
        "content": "No.",
        "reasoning_content": turn.reasoning,
    }
    turn = read(readers, "json", f"<think>\nHm. {JSON_CALL}", stopped=False)  # it still thinks
    assert not turn.calls and turn.reasoning.startswith("Hm.") and not turn.content


def test_thinking_that_the_template_has_begun():
    spelling = Spelling(chat_families.qwen()[0])
    opening = "<|im_start|>assistant\n<think>\n"
    reader = Reader(call_formats.QWEN_JSON, spelling, TOOLS, opening)
    turn = reader.read(spelling.full(f"Hm.\n</think>\n\n{JSON_CALL}<|im_end|>"))
    assert turn.reasoning == "Hm." and turn.calls == (Call("multiply", {"a": 1}),)


def test_braces_in_words_are_no_call_of_llama(readers):
    for text in ("{b} is a set", 'I say {"name": "f", "parameters": {}}', "{}"):
        turn = read(readers, "llama", text)
        assert turn.content == text and not turn.calls


def test_the_message_has_the_form_of_trl(readers):
    turn = read(readers, "json", f"I look.\n{JSON_CALL}")
    assert turn.message == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "multiply", "arguments": {"a": 1}}}
        ],
    }


OWN = {  # as a checkpoint may bring one, with a form that no table of ours has
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"@(?P<name>\w+)",
            "close": "@",
            "content": "json",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def test_a_template_of_the_checkpoint():
    tokenizer, _ = chat_families.qwen()
    tokenizer.response_template = OWN
    form = call_formats.candidates(tokenizer)[0]
    assert form.is_own and call_formats.candidates(chat_families.qwen()[0])[0] is not form
    spelling = Spelling(tokenizer)
    reader = Reader(form, spelling, TOOLS, "<|im_start|>assistant\n")
    turn = reader.read(spelling.full('<think>a</think>So @f {"a": 1}@ @g {@ end<|im_end|>'))
    assert turn.reasoning == "a" and turn.content == "So   end"
    assert turn.calls[0] == Call("f", {"a": 1})
    assert turn.calls[1].kind == "syntax" and turn.calls[1].text == "@g {@"


def test_a_turn_without_tools_has_no_calls():
    spelling = Spelling(chat_families.qwen()[0])
    form = call_formats.without_calls(Format("any", OWN))
    turn = Reader(form, spelling).read(spelling.full(f"<think>a</think>{JSON_CALL}<|im_end|>"))
    assert turn.calls == () and turn.content == JSON_CALL.strip() and turn.reasoning == "a"
