"""How models write calls of tools: declarative response templates of transformers, a few.

A checkpoint may bring its own (`tokenizer.response_template`). For those that do not, these are the
forms of four families, as their chat templates render calls. Which one a model has is found by
rendering a call with its template and reading it (`dialogue.prove`), not by its name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

CALLS = "tool_calls"  # the field of a response template that holds calls
REASONING = ("reasoning_content", "thinking", "reasoning")  # and the reasoning, by any of these


@dataclasses.dataclass(frozen=True)
class Format:
    """A form of calls: the response template that reads one, and where calls begin and end."""

    name: str
    template: dict[str, Any]
    # Of CALLS, in place of its own: looser ones, for calls that the template would take for text.
    anchors: dict[str, Any] = dataclasses.field(default_factory=dict)
    # What is left of a call without its opening and its parameters; None: anything.
    rest: str | None = None
    is_own: bool = False  # it came with the checkpoint


_CONTENT = {"content": "text"}
_THINK = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}
_FUNCTION = {"type": "function", "function": "{content}"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def _template(**calls: Any) -> dict[str, Any]:
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"\A",  # the reader gives the turn alone
        "fields": {
            "reasoning_content": _THINK,
            CALLS: {"repeats": True, **calls},
            "content": _CONTENT,
        },
    }


# <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>: Qwen2.5, Qwen3, Hermes.
QWEN_JSON = Format(
    "Qwen's JSON",
    _template(open="<tool_call>", close="</tool_call>", content="json", transform=_FUNCTION),
)

# <tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>: Qwen3-Coder,
# Qwen3.5. Values are texts, and get the types of the tool's schema.
_PARAMETER = r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
QWEN_XML = Format(
    "Qwen's XML",
    _template(
        open_pattern=r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
        close="</tool_call>",
        content="xml-inline",
        content_args={
            "tag_pattern": _PARAMETER,
            "value_parser": {"name": "text", "args": {"strip": False}},
        },
        transform=_NAMED,
    ),
    anchors={"open_pattern": "<tool_call>"},
    rest="</function></tool_call>",
)

# {"name": "f", "parameters": {"a": 1}}, alone in a turn: Llama 3.
LLAMA = Format(
    "Llama's JSON",
    _template(
        open_pattern=r"\A\s*(?:<\|python_tag\|>\s*(?=\{)|(?=\{\s*\"))",
        close_pattern=r"<\|eot_id\|>|<\|eom_id\|>|\Z",
        content="json",
        transform={
            "type": "function",
            "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
        },
    ),
)

# [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]: Mistral, tokenizer v3.
MISTRAL = Format(
    "Mistral's list",
    _template(
        open="[TOOL_CALLS]",
        close_pattern=r"(?=\[TOOL_CALLS\])|</s>|\Z",
        content="json",
        transform=_FUNCTION,
    ),
)

# [TOOL_CALLS]f[ARGS]{"a": 1}, repeated: Mistral, tokenizer v11 and later.
MISTRAL_ARGS = Format(
    "Mistral's [ARGS]",
    _template(
        open_pattern=r"\[TOOL_CALLS\](?P<name>[^\[\]{}]+)(?:\[CALL_ID\][^\[\]{}]+)?\[ARGS\]",
        close_pattern=r"(?=\[TOOL_CALLS\])|</s>|\Z",
        content="json",
        transform=_NAMED,
    ),
    anchors={"open_pattern": r"\[TOOL_CALLS\]"},
)

FORMATS = (QWEN_JSON, QWEN_XML, MISTRAL, MISTRAL_ARGS, LLAMA)


def candidates(tokenizer: Any) -> list[Format]:
    """The tokenizer's own response template, if it has one that reads calls, and FORMATS."""
    own = getattr(tokenizer, "response_template", None)
    if isinstance(own, dict) and CALLS in (own.get("fields") or {}):
        return [Format("the checkpoint's own", own, is_own=True), *FORMATS]
    return list(FORMATS)


def without_calls(form: Format) -> Format:
    """A format for turns without tools: its reasoning and its content."""
    if not form.is_own:
        form = QWEN_JSON
    fields = {name: field for name, field in form.template["fields"].items() if name != CALLS}
    return Format("no calls", form.template | {"fields": fields}, is_own=form.is_own)
