"""An environment for `environments.py`; its processes import this file, without JAX."""

from __future__ import annotations

import time


class Sleeper:
    """Answers each turn after some time."""

    def reset(self, seconds: float = 0.0, **row) -> None:
        self.seconds = seconds

    def respond(self, messages: list) -> str:
        if self.seconds:  # a sleep of no time takes 0.1 ms
            time.sleep(self.seconds)
        return "..."

    def get_reward(self) -> float:
        return 0.0
