"""Chats: prompts that are lists of messages, in the forms that data sets use."""

from __future__ import annotations

import ast
import difflib
import json
import re
from typing import Any

from grpo_jax.messages.values import cut

Messages = list[dict[str, Any]]  # each with a "role", and with a "content" or "tool_calls"

# Columns of a row that are passed to the chat template, named as in transformers and TRL.
TOOLS, ARGUMENTS = "tools", "chat_template_kwargs"

# Arguments of every template that the program sets; no row or option may set them.
_RESERVED = {
    *("messages", "conversation", "conversations", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask", "tokenize", TOOLS),
}

_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


def in_text(text: str) -> Any:
    """The list of messages that a text contains, as in CSV files; any other text as it is.

    The list is in JSON or Python syntax. Raises ValueError for a text that begins like a list of
    messages but cannot be read as one, since it is not meant as a prompt.
    """
    if "role" not in text or text.lstrip()[:1] != "[":
        return text
    value = literal(text)
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and "role" in m for m in value)
    ):
        return value
    if _LIKE_MESSAGES.match(text):
        raise ValueError(
            "begins as a list of messages written as text, and cannot be read as one, neither as "
            "JSON nor as Python"
        )
    return text


def literal(text: str) -> Any:
    """The value of a text in JSON or Python syntax; the text itself if it is in neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def without_nulls(value: Any) -> Any:
    """A value without keys whose value is null, at every depth."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


# Names of roles in ShareGPT's chats; others stay.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "chatgpt": "assistant"}
# Roles that chat templates know; and other names of these, with which most would write nonsense.
_KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_OTHER = _ROLES | {"bot": "assistant", "ai": "assistant", "model": "assistant"}


def with_roles(messages: list) -> list:
    """Messages with "role" and "content" for ShareGPT's "from" and "value"; others as they are."""

    def renamed(message: Any) -> Any:
        if not isinstance(message, dict) or "from" not in message or "role" in message:
            return message
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        role = message["from"]
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        return {"role": role, "content": message.get("value")} | rest

    return [renamed(message) for message in messages]


def fault(messages: list, *, is_prompt: bool = True) -> str | None:
    """The fault of a list of messages; None for a valid one.

    `is_prompt`: it must hold a text, and not end in calls of tools. A completion need not.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"has a {type(message).__name__} as message {i}"
        role = message.get("role")
        if not isinstance(role, str):
            return f"has no text as `role` of message {i}"
        if meant := _meant(role):
            return f"has {cut(repr(role), 40)} as `role` of message {i}, which is to be {meant!r}"
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                kind = part.get("type", "text") if isinstance(part, dict) else part
                if kind != "text":
                    shown = cut(repr(kind), 40)
                    return f"has {shown} in `content` of message {i}, and text alone is read"
                if not isinstance(part.get("text"), str):
                    return f"has a part without `text` in `content` of message {i}"
        elif not isinstance(content, str) and (content is not None or not _calls(message)):
            return f"has no text as `content` of message {i}"
    if not is_prompt:
        return None if messages else "holds no message"
    if messages and _calls(messages[-1]) and messages[-1]["role"] == "assistant":
        return "ends in the assistant's tool calls, with no message of a tool after them"
    return None if any(_text(m.get("content")).strip() for m in messages) else "holds no text"


def _meant(role: str) -> str | None:
    """The role that is meant by a misspelled one; None for one that is known, or of its own."""
    if role in _KNOWN:
        return None
    plain = role.strip().lower()
    near = difflib.get_close_matches(plain, _KNOWN[:5], 1, 0.75)
    return _OTHER.get(plain, near[0] if near else None)


def unknown_roles(messages: Messages) -> set[str]:
    """Roles of their own, which few chat templates write as they are meant."""
    return {message["role"] for message in messages} - {*_KNOWN}


def _calls(message: dict[str, Any]) -> bool:
    calls = message.get("tool_calls")
    return isinstance(calls, list) and bool(calls)


def _text(content: Any) -> str:
    """Text parts joined by line feeds, as servers do for templates."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def plain(messages: Messages) -> Messages:
    """Valid messages in the form for chat templates: contents are texts, no key is null."""
    return [
        {k: _text(v) if k == "content" else v for k, v in message.items() if v is not None}
        for message in messages
    ]


def given(columns: dict[str, Any], padded: bool) -> dict[str, Any]:
    """A row's arguments for the chat template besides messages, by the template's names.

    `padded`: the row is from a kind of file in which all rows have all keys, with null for a
    missing value. Raises ValueError for columns of the wrong form.
    """
    found: dict[str, Any] = {}
    arguments = _read(columns.get(ARGUMENTS), padded)
    if arguments is not None:
        if not isinstance(arguments, dict):
            raise ValueError(
                f"`{ARGUMENTS}` is a {type(arguments).__name__}: {cut(repr(arguments))}. It must "
                'be an object with arguments of the chat template, such as {"enable_thinking": '
                "false}"
            )
        refuse_reserved(arguments, f"`{ARGUMENTS}`")
        found |= arguments
    tools = _read(columns.get(TOOLS), padded)
    if tools is not None:
        if isinstance(tools, list):
            tools = [_read(tool, padded) for tool in tools]
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(
                f"`{TOOLS}` is {cut(repr(tools))}.{_broken(tools)} It must be a list of JSON "
                "schemas of functions, or null; rename the column in data.columns if it holds "
                "something else"
            )
        found[TOOLS] = tools
    return found


def _read(value: Any, padded: bool) -> Any:
    if isinstance(value, str):
        return literal(value)
    return without_nulls(value) if padded else value


def _broken(value: Any) -> str:
    """Where a text that begins like JSON, or the first such text of a list, is not JSON; or ""."""
    texts = [text for text in (value if isinstance(value, list) else [value])]
    text = next((t for t in texts if isinstance(t, str) and t.lstrip()[:1] in ("[", "{")), "")
    try:
        json.loads(text or "[]")
    except ValueError as error:
        return f" That is no JSON ({error})."
    return ""


def refuse_reserved(names: Any, where: str) -> None:
    """Raises ValueError for template arguments that the program sets itself."""
    taken = sorted(_RESERVED.intersection(names))
    if taken:
        remedy = f"Give tools in a column `{TOOLS}`" if taken == [TOOLS] else "Leave it out"
        raise ValueError(f"{where} has `{taken[0]}`, which the program gives itself. {remedy}")
