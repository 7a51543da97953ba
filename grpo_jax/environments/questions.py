"""Problems as a policy reads them."""

from __future__ import annotations

import dataclasses

from grpo_jax.data.problems import Problem


@dataclasses.dataclass(frozen=True)
class Questions:
    """Problems with their prompts as tokens and as the text those stand for."""

    problems: list[Problem]
    prompt_ids: list[list[int]]
    texts: list[str]

    def take(self, index) -> Questions:
        """Some of them, by number."""
        pick = lambda items: [items[i] for i in index]  # noqa: E731
        return Questions(pick(self.problems), pick(self.prompt_ids), pick(self.texts))
