"""The game of the task guess_word, and one whose answers are of no use."""

from __future__ import annotations

import math
import random
from typing import Any

from grpo_jax.data.tasks.guess_word import GUESSES, WORDS, told


class GuessWord:
    """Says of each guess whether the hidden word is earlier or later.

    The reward of a turn is its share of what was to be found out; that of a game is 1 or 0.
    """

    turn_reward = 0.0

    def reset(self, word: str, **row) -> None:
        """Begins a game.

        Args:
            word: The hidden word.
        """
        self._hidden = WORDS.index(word)
        self._low, self._past = 0, len(WORDS)
        self._guesses, self._is_won = 0, False

    def respond(self, messages: list[dict[str, Any]]) -> str | None:
        """Answers a guess; None ends the game."""
        said = messages[-1]["content"].split()
        self._guesses += 1
        if len(said) != 1 or said[0] not in WORDS:
            return None
        guess = WORDS.index(said[0])
        before = self._past - self._low
        self._is_won = guess == self._hidden
        if self._is_won:
            self._low, self._past = guess, guess + 1
        elif guess < self._hidden:
            self._low = max(self._low, guess + 1)
        else:
            self._past = min(self._past, guess)
        left = self._past - self._low
        self.turn_reward = math.log(before / left) / math.log(len(WORDS))
        if self._is_won or self._guesses == GUESSES:
            return None
        return self._answer(guess)

    def _answer(self, guess: int) -> str:
        return f" {told(guess, self._hidden)}"

    def get_reward(self) -> float:
        """1 if the word was found."""
        return float(self._is_won)


class DeafGuessWord(GuessWord):
    """For a control: what it answers has nothing to do with the guess."""

    def _answer(self, guess: int) -> str:
        return random.choice((" earlier", " later"))
