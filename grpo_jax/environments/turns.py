"""A turn of the policy as text: what it said, what it thought, and the tools it called.

Processes of environments import this file, so it imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Call:
    """A well-formed call of a tool; whether there is such a tool is for the environment to say."""

    name: str
    arguments: dict[str, Any]
    id: str = ""  # the call's own name for itself, where the model writes one (Mistral)


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A call that cannot be read. It is counted by its kind, and never repaired."""

    kind: str  # one of KINDS
    reason: str  # a sentence for the model
    text: str = ""  # as it was sampled


# What may be wrong with a call: it has no end; its text is not in the format; it names no tool;
# its arguments are no object with names.
KINDS = ("unclosed", "syntax", "name", "arguments")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of the policy, read from the ids that it sampled."""

    content: str
    reasoning: str = ""
    calls: tuple[Call | Malformed, ...] = ()  # in their order

    @property
    def valid_calls(self) -> tuple[Call, ...]:
        """The calls that can be carried out."""
        return tuple(call for call in self.calls if isinstance(call, Call))

    @property
    def message(self) -> dict[str, Any]:
        """The turn in the form of TRL 1.16 and of chat templates.

        A malformed call stands in `content`, as it was sampled.
        """
        parts = [self.content, *(c.text for c in self.calls if isinstance(c, Malformed))]
        found: dict[str, Any] = {
            "role": "assistant",
            "content": "\n".join(part for part in parts if part),
        }
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.valid_calls:
            found["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                | ({"id": c.id} if c.id else {})
                for c in self.valid_calls
            ]
        return found
