"""Environments of Gymnasium as conversations: a turn of the policy is an action.

    environment.classes = (
        "grpo_jax.environments.adapters.gymnasium:Gymnasium(name='FrozenLake-v1', "
        "render_mode='ansi', actions=('left', 'down', 'right', 'up'))",
    )

The observation is a text: of the environment itself, of its rendering with render_mode "ansi", or
its numbers. A subclass may write `_text` anew. Needs the extra `gymnasium`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d+")


class Gymnasium:
    """One environment of Gymnasium; the episode's reward is the sum of its steps'."""

    turn_reward = 0.0

    def __init__(self, name: str = "", actions: Sequence[str] = (), **options: Any):
        """`name` and `options` are those of `gymnasium.make`; `actions`: words for 0, 1, 2, ..."""
        self._gym = self._make(name, options)
        space = self._gym.action_space
        self._num = int(space.n) if hasattr(space, "n") else 0
        self._first = int(getattr(space, "start", 0))
        self._actions = tuple(actions)
        self._total = 0.0
        if self._actions and len(self._actions) != self._num:
            raise ValueError(
                f"actions has {len(self._actions)} words, and {name} has {self._num or 'no'} "
                "numbered actions."
            )

    def _make(self, name: str, options: dict[str, Any]) -> Any:
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError(
                "Gymnasium is not installed: pip install 'grpo_jax[gymnasium]'."
            ) from error
        return gymnasium.make(name, **options)

    def reset(self, seed: int | None = None, **row: Any) -> str:
        """Begins an episode, with the seed of its group; the first observation."""
        observation, information = self._gym.reset(seed=seed)
        self._total = 0.0
        return self._text(observation, information)

    def respond(self, messages: list[dict[str, Any]]) -> str | None:
        """Takes a step; None ends the episode."""
        try:
            action = self._action(messages[-1]["content"] or "")
        except ValueError as error:
            self.turn_reward = 0.0
            return str(error)
        observation, reward, terminated, truncated, information = self._gym.step(action)
        self.turn_reward = float(reward)
        self._total += self.turn_reward
        if terminated or truncated:
            return None
        return self._text(observation, information)

    def _action(self, said: str) -> Any:
        """The action that a turn names; ValueError with what may be said."""
        if not self._num:
            return self._of_another_space(said)
        if self._actions:
            found = re.findall("|".join(map(re.escape, self._actions)), said)
            if found:
                return self._first + self._actions.index(found[-1])
            raise ValueError(f"Say one of: {', '.join(self._actions)}.")
        numbers = [int(n) for n in _NUMBER.findall(said)]
        if numbers and self._first <= numbers[-1] < self._first + self._num:
            return numbers[-1]
        raise ValueError(f"Say a number from {self._first} to {self._first + self._num - 1}.")

    def _of_another_space(self, said: str) -> Any:
        """The action of a space of texts, or of one of several numbers, written as JSON."""
        space = self._gym.action_space
        if space.dtype is str:
            action: Any = said.strip()
        else:
            import numpy as np

            try:
                action = np.asarray(json.loads(said), space.dtype).reshape(space.shape)
            except (ValueError, TypeError):
                action = None
        if action is not None and space.contains(action):
            return action
        raise ValueError(f"Say an action of {space}; numbers as JSON, such as [0, 1].")

    def _text(self, observation: Any, information: dict[str, Any]) -> str:
        """An observation as the policy reads it."""
        if isinstance(observation, str):
            return observation
        if self._gym.render_mode == "ansi":
            return str(self._gym.render())
        return str(observation.tolist() if hasattr(observation, "tolist") else observation)

    def get_reward(self) -> float:
        """The sum of the steps' rewards."""
        return self._total
