"""Conversations of models without a chat template: plain text after plain text.

What the environment says follows the policy's stop token as its own tokens, and the policy goes on
after it. Calls of tools are written `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_jax.environments.call_formats import QWEN_JSON
from grpo_jax.environments.observations import Observations
from grpo_jax.environments.spelling import Spelling
from grpo_jax.environments.tool_calls import Reader
from grpo_jax.environments.turns import Turn


class PlainDialogue:
    """As `dialogue.Dialogue`, for prompts that are plain text."""

    notes: tuple[str, ...] = ()
    rewriting: None = None

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[dict[str, Any]] = (),
        *,
        stop_ids: Sequence[int],
        observation_tokens: int,
        allow_control_tokens: bool = False,
        spelling: Spelling | None = None,
    ):
        """The options are those of `dialogue.prove`."""
        self._spelling = spelling or Spelling(tokenizer)
        self._stop_ids = tuple(stop_ids)
        self._observations = Observations(self._spelling, observation_tokens)
        self._encode = self._spelling.full if allow_control_tokens else self._spelling.plain
        self._reader = Reader(QWEN_JSON, self._spelling, tools) if tools else None
        self._between = _between(self._spelling)

    def parse(self, turn_ids: Sequence[int]) -> Turn:
        """The turn that the policy sampled, its stop token included if it ended with one."""
        if self._reader:
            return self._reader.read(turn_ids)
        ids = list(turn_ids)
        return Turn(
            self._spelling.text(ids[:-1] if ids[-1:] and ids[-1] in self._stop_ids else ids)
        )

    def follow(
        self, turn_ids: Sequence[int], stopped: bool, messages: Sequence[dict[str, Any]]
    ) -> list[int]:
        """The ids to append after a turn, as of `dialogue.Dialogue.follow`."""
        texts = self._observations.fitted([str(m.get("content") or "") for m in messages])
        close = [] if stopped else [self._stop_ids[0]]
        return close + self._encode(self._between.join(texts))

    def begin(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        arguments: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[int]]:
        """Prompts with what the environment said at its reset, as of `dialogue.Dialogue.begin`."""
        read = self._spelling.prompt
        return [read(prompt) + self._encode(text) for prompt, text in zip(prompts, texts)]


def _between(spelling: Spelling) -> str:
    """What separates texts of one group: a line feed, a space, or nothing if there are no such."""
    written = (text for text in ("\n", " ") if spelling.text(spelling.plain(text)) == text)
    return next(written, "")
