"""Environments and tools as users of TRL 1.16 write them; nothing here knows grpo_jax."""

from __future__ import annotations

import random


class CounterEnv:
    """A counter that is to reach a target."""

    def __init__(self):
        self.counter = 0
        self.target = 0

    def reset(self, **kwargs) -> str | None:
        self.counter = 0
        self.target = kwargs["target"]
        return f" Count to {self.target}."

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter


def counter_reward(completions, environments, **kwargs):
    return [1.0 if env.counter == env.target else 0.0 for env in environments]


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


async def async_add(a: int, b: int) -> int:
    """
    Asynchronously adds two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The sum of the two integers.
    """
    return a + b


WORDS = ["crane", "slate", "pride", "mouse", "ghost"]


class WordGameEnv:
    """Five letters to be guessed; the end of the game is an exception, as TRL's docs advise."""

    def __init__(self):
        self.reward = 0.0
        self.done = True

    def reset(self, **kwargs) -> str | None:
        self.word = random.choice(WORDS)
        self.left = 6
        self.reward = 0.0
        self.done = False
        return "Guess a word of five letters."

    def guess(self, word: str) -> str:
        """
        Makes a guess.

        Args:
            word: The guessed word, formatted as '[abcde]'.

        Returns:
            The feedback: G right, Y elsewhere, X not in the word.
        """
        if self.done:
            raise ValueError("Game over.")
        word = word.strip("[]").lower()
        if len(word) != 5:
            raise ValueError("A word has five letters.")
        self.left -= 1
        marks = ["G" if a == b else "Y" if a in self.word else "X" for a, b in zip(word, self.word)]
        self.reward = max(self.reward, marks.count("G") / 5)
        self.done = word == self.word or not self.left
        return "".join(marks)

    def get_reward(self) -> float:
        return self.reward
