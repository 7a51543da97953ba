"""Chat templates do no harm: what they can reach, how long they run, how much they hold."""

from __future__ import annotations

import pytest

from grpo_jax.data import templates
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode

CHAT = [{"role": "user", "content": "hi"}]


class Tokenizer:
    """Only what a template needs of one."""

    def __init__(self, template: str, **special: object):
        self.template, self.special_tokens_map = template, special

    def get_chat_template(self) -> str:
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
        [{"role": "user", "content": "a\u2028b", "name": None}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": "", "name": "d"}],
    ]
    assert templates.render(tokenizer, chats) == [
        "<s>a\u2028b\ud800c\ud800AFalse",
        "<s>\ud800ATrue",
    ]


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


def test_a_template_writes_a_bounded_text():
    assert "a text of 1048577 characters, 1048576 at most" in reason("{{ 'x' * 1048577 }}")
