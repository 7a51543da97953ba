"""Chat templates do no harm: what they can reach, how long they run, how much they hold."""

from __future__ import annotations

from datetime import datetime

import pytest

from grpo_jax.data import templates
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode

CHAT = [{"role": "user", "content": "hi"}]


class Tokenizer:
    """Only what a template needs of one."""

    def __init__(self, template: str, **special: object):
        self.template, self.special_tokens_map, self.bos_token = template, special, None

    def get_chat_template(self, tools=None) -> str:
        return self.template


def reason(template: str, chats: list | None = None) -> str:
    with pytest.raises(templates.TemplateError) as error:
        templates.render(Tokenizer(template), chats or [CHAT])
    return str(error.value)


def test_conversations_in_their_order():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content ~ extra[1] }}{% endfor %}"
    template += "{{ 'A' if add_generation_prompt }}{{ messages[0].name is defined }}"
    tokenizer = Tokenizer(template, bos_token="<s>", extra=["x", "\ud800"])
    chats = [
        [{"role": "user", "content": "a\u2028b"}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": "", "name": "d"}],
    ]
    assert templates.render(tokenizer, chats).texts == [
        "<s>a\u2028b\ud800c\ud800AFalse",
        "<s>\ud800ATrue",
    ]


def test_the_assistants_message_is_continued():
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    begun = {"role": "assistant", "content": "Once "}
    chats = [CHAT, [*CHAT, begun], [*CHAT, begun, *CHAT]]
    assert templates.render(Tokenizer(template), chats).texts == [
        "[user]hi;[assistant]",
        "[user]hi;[assistant]Once",  # the template trims
        "[user]hi;[assistant]Once;[user]hi;[assistant]",
    ]
    assert "does not appear in the chat" in reason(
        "{{ messages[0].content }}{{ messages[1] and 'content' }}", [[*CHAT, begun]]
    )


def test_what_templates_are_given_besides():
    template = "{{ tools }}{{ enable_thinking | default('unset') }}{{ bos_token }}{{ range(2) }}"
    rendered = templates.render(
        Tokenizer(template, bos_token="<s>"),
        [CHAT, CHAT],
        [{"tools": [{"name": "f"}], "enable_thinking": False}, {}],
    )
    assert rendered.texts == ["[{'name': 'f'}]False<s>range(0, 2)", "Noneunset<s>range(0, 2)"]
    assert rendered.reads == {"tools", "enable_thinking"}


def test_a_template_of_its_own_for_tools():
    class Several(Tokenizer):
        def get_chat_template(self, tools=None):
            return self.template if tools is None else "tools: {{ tools | length }}"

    given = [{}, {"tools": [{}, {}]}, {}]
    rendered = templates.render(Several("plain {{ x }}"), [CHAT] * 3, given)
    assert rendered.texts == ["plain ", "tools: 2", "plain "]
    assert rendered.reads == {"tools", "x"}


def test_a_template_does_the_same_at_each_start():
    """It is told the time that it is given, and draws the same by lot."""
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }} {{ range(99999) | random }}"
    now = datetime(2026, 11, 28, 20, 15, 7)
    first, second = (templates.render(Tokenizer(template), [CHAT] * 2, now=now) for _ in range(2))
    assert first == second and first.texts[0].startswith("28 Nov 2026 20:15:07 ")
    later = templates.render(Tokenizer(template), [CHAT], now=datetime(2027, 1, 1))
    assert later.texts == [first.texts[0].replace("28 Nov 2026 20:15:07", "01 Jan 2027 00:00:00")]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{% set _ = messages.append(messages[0]) %}",
    ],
)
def test_a_template_reaches_nothing_else(template):
    assert "SecurityError" in reason(template)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(templates, "TIME_LIMIT_S", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    problems = [
        Problem(CHAT, {}, "p.jsonl, line 1"),
        Problem([*CHAT, *CHAT], {}, "p.jsonl, line 2"),
    ]
    tokenizer = Tokenizer("{% if messages | length > 1 %}" + endless + "{% endif %}x")
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2 .* not done after 1 s"):
        encode(problems, tokenizer, 8)
    assert "not done after 1 s" in reason("{{ 9**(9**(9**9)) }}")  # in C, and while it is compiled


def test_a_template_holds_bounded_memory():
    assert "asked for more than 2 GiB" in reason("{{ ('x' * 2500000000) | length }}")


def test_a_template_writes_a_bounded_text(monkeypatch):
    assert "a text of 1048577 characters, 1048576 at most" in reason("{{ 'x' * 1048577 }}")
    monkeypatch.setattr(templates, "MAX_CHARS_OF_ALL", 25)
    told = []
    with pytest.raises(templates.TemplateError) as error:
        templates.render(Tokenizer("{{ 'x' * 10 }}"), [CHAT] * 5, on_text=told.append)
    words = "with it, the texts of 3 prompts have 30 characters, and all together may have 25"
    assert str(error.value) == words and error.value.number == 2 and told == [1, 2]


def test_a_conversation_larger_than_a_pipe():
    """What is written to the process and read from it waits for neither."""
    text = "x" * 300_000
    chats = [[{"role": "user", "content": text}]] * 8
    assert templates.render(Tokenizer("{{ messages[0].content }}"), chats).texts == [text] * 8
