"""A word game: a hidden word of a made list is found by its place in the alphabet.

The player names a word, and is told whether the hidden one is earlier or later; five guesses are
enough for a player who halves what is left, and for few others. It is played without tools: the
environment answers what is said. Most demonstrations guess anything; the others stay within what
is left. The prompt is the number of the game, which tells nothing.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerFast

from grpo_jax.data import small_tokenizer
from grpo_jax.data.problems import Problem
from grpo_jax.data.streams import stream
from grpo_jax.data.tasks import Piece

WORDS = (
    "bado bemi buto dafe deki dolu fami fibo gato gume hilo jabu jote kade kimo lafu lemo luta "
    "mibe nado nemu pilo pude rafo remi sabu silo tame tufi vado zemi"
).split()
GUESSES = 5  # 2 ** 5 - 1 words can be told apart
CARELESS = 0.75  # share of players who forget what they were told
FOUND = "found"


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out games, all different from each other."""
    rng = stream(seed, "problems")
    numbers = rng.permutation(10 * (num_train + num_eval))[: num_train + num_eval]
    problems = [
        Problem(
            f"G{number}:",
            {"word": WORDS[rng.integers(len(WORDS))]},
            f"task guess_word, problem {place}",
        )
        for place, number in enumerate(numbers, start=1)
    ]
    return problems[num_eval:], problems[:num_eval]


def told(guess: int, hidden: int) -> str:
    """What the game says of a guess, both by their places in WORDS."""
    if guess == hidden:
        return FOUND
    return "earlier" if hidden < guess else "later"


def worked_solution(problem: Problem, rng: np.random.Generator) -> list[Piece]:
    """A game, won or lost, of a player who guesses within what is left, or anywhere."""
    hidden = WORDS.index(problem.columns["word"])
    is_careless = rng.random() < CARELESS
    low, past = 0, len(WORDS)
    pieces: list[Piece] = []
    for turn in range(GUESSES):
        guess = int(rng.integers(len(WORDS)) if is_careless else rng.integers(low, past))
        is_last = guess == hidden or turn == GUESSES - 1
        pieces.append(Piece(f" {WORDS[guess]}" + "<eos>" * (not is_last)))
        if is_last:
            break
        pieces.append(Piece(f" {told(guess, hidden)}", is_policy=False))
        low, past = (low, guess) if hidden < guess else (guess + 1, past)
    return pieces


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, and one per digit."""
    return small_tokenizer.make("G0123456789:#", [*WORDS, "earlier", "later"])
