"""The text of a completion, which is a text or a chat."""

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


def _text_of_content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("text"))
