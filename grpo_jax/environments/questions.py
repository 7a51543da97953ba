"""Problems as a policy reads them: tokenized prompts."""

from __future__ import annotations

import dataclasses

from grpo_jax.data.problems import Problem


@dataclasses.dataclass(frozen=True)
class Questions:
    """Problems with their prompts, as token ids and as the text of those tokens."""

    problems: list[Problem]
    prompt_ids: list[list[int]]
    texts: list[str]

    def take(self, index) -> Questions:
        """The questions of these numbers."""
        pick = lambda items: [items[i] for i in index]  # noqa: E731
        return Questions(pick(self.problems), pick(self.prompt_ids), pick(self.texts))
