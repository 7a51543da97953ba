"""Conversations in token ids: what a chat template writes around an environment's messages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from grpo_jax.data.templates import Renderer
from grpo_jax.environments.spelling import Spelling
from grpo_jax.environments.turns import Turn


class Dialogue:
    """The turns of one tokenizer and one list of tools; `prove` makes it.

    `notes`: sentences for the user, such as that the template rewrites earlier thinking.
    """

    notes: tuple[str, ...]

    def parse(self, turn_ids: Sequence[int]) -> Turn:
        """The turn that the policy sampled, its stop token included if it ended with one."""
        raise NotImplementedError

    def follow(
        self, turn_ids: Sequence[int], stopped: bool, messages: Sequence[dict[str, Any]]
    ) -> list[int]:
        """The ids to append after a turn: the environment's messages, and the next opening.

        A turn that was cut by a limit (not `stopped`) is closed first.
        """
        raise NotImplementedError

    def begin(
        self,
        prompts: Sequence[Sequence[dict[str, Any]]],
        texts: Sequence[str],
        arguments: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[int]]:
        """Prompts whose last user message ends with a text of the environment's reset."""
        raise NotImplementedError


def prove(
    tokenizer: Any,
    tools: Sequence[dict[str, Any]],
    renderer: Renderer,
    *,
    stop_ids: Sequence[int],
    observation_tokens: int,
    replies: bool = False,
    arguments: dict[str, Any] | None = None,
    now: datetime | None = None,
    allow_control_tokens: bool = False,
    spelling: Spelling | None = None,
) -> Dialogue:
    """A Dialogue; raises ValueError where the template cannot hold one."""
    raise NotImplementedError
