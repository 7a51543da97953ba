"""The text of a completion (a text or a chat), and whether it begins inside of thinking."""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """A text itself, or the content of the assistant's last message in a list of messages.

    A message is {"role": "assistant", "content": ...}; without a role it counts as the assistant's.
    Content is a text, None (read as ""), or a list of parts; the parts with a "text" are joined. A
    list without a message of the assistant gives "". Raises TypeError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, (list, tuple)):
        for message in reversed(completion):
            if message.get("role", "assistant") == "assistant":
                return _text_of_content(message["content"])
        return ""
    raise TypeError(f"a completion is a text or a list of messages, not {type(completion)}")


def last_text_of(prompt: Any) -> str:
    """A text itself, or the content of the last message in a list of messages, of any role."""
    if isinstance(prompt, str):
        return prompt
    return _text_of_content(prompt[-1]["content"]) if prompt else ""


def opens_thinking(text: str) -> bool:
    """Whether a text leaves thinking open: after its last <think> no </think> follows."""
    return text.rfind("<think>") > text.rfind("</think>")


def begin_in_thinking(prompts: list[Any], rendered_prompts: list[str] | None) -> list[bool]:
    """True for each completion that begins inside of thinking, which the end of its prompt opened.

    `rendered_prompts` are the prompts as the model read them, chat template included: some
    templates end in <think>. Without them only the end of the prompt itself counts: a prompt that
    asks to write <think> opens no thinking.
    """
    if rendered_prompts is None:
        return [last_text_of(prompt).rstrip().endswith("<think>") for prompt in prompts]
    return [opens_thinking(text) for text in rendered_prompts]


def after_thinking(text: str, thinking: bool = False) -> str | None:
    """The text of a completion after its last </think>; None if its thinking does not end.

    `thinking`: whether it begins inside of thinking.
    """
    _, closed, rest = text.rpartition("</think>")
    return None if "<think>" in rest or (thinking and not closed) else rest


def replies(
    prompts: list[Any], completions: list[Any], rendered_prompts: list[str] | None
) -> list[str | None]:
    """The text of each completion after its thinking; None if the thinking does not end."""
    thinking = begin_in_thinking(prompts, rendered_prompts)
    return [
        after_thinking(text_of(c), inside) for c, inside in zip(completions, thinking, strict=True)
    ]


def _text_of_content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("text"))
