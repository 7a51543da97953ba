"""The text of a completion, which is a text or a chat, and whether it begins inside of thinking."""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """A text as it is; of a list of messages, the content of the last that the assistant wrote.

    A message is {"role": "assistant", "content": ...}; without a role it counts as the
    assistant's. Content is a text, None (read as ""), or a list of parts of which those with a
    "text" are joined. Messages without one of the assistant give "". Raises TypeError for
    anything else.
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
    """A text as it is; of a list of messages, the content of the last, whoever wrote it."""
    if isinstance(prompt, str):
        return prompt
    return _text_of_content(prompt[-1]["content"]) if prompt else ""


def opens_thinking(text: str) -> bool:
    """Whether a text leaves thinking open: after its last <think> no </think> follows."""
    return text.rfind("<think>") > text.rfind("</think>")


def begin_in_thinking(prompts: list[Any], rendered_prompts: list[str] | None) -> list[bool]:
    """Which completions begin inside of thinking that the end of their prompt opened.

    `rendered_prompts` are the prompts as the model read them, chat template included: some
    templates end in <think>. Without them the end of the prompt itself counts: a text that asks
    to write <think> opens nothing.
    """
    if rendered_prompts is None:
        return [last_text_of(prompt).rstrip().endswith("<think>") for prompt in prompts]
    return [opens_thinking(text) for text in rendered_prompts]


def after_thinking(text: str, thinking: bool = False) -> str | None:
    """What a completion says after its last </think>; None where its thinking does not end.

    `thinking`: it begins inside of thinking.
    """
    _, closed, rest = text.rpartition("</think>")
    return None if "<think>" in rest or (thinking and not closed) else rest


def _text_of_content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("text"))
