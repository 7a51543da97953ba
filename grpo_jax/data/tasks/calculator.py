"""Products of large numbers, with a tool that multiplies: "374*28=" has the answer 10472.

A small network cannot compute such a product, but it can copy the factors into a call of the tool,
and the result into its answer. The demonstrations are those of proud students: most guess, the
others call the tool and sometimes mistype. A model that imitates them mostly guesses;
reinforcement learning finds that asking pays. With a tool that returns noise it finds nothing.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerFast

from grpo_jax.data import small_tokenizer
from grpo_jax.data.problems import Problem
from grpo_jax.data.streams import stream
from grpo_jax.data.tasks import Piece

GUESS = 0.7  # share of demonstrations without the tool
SLIP = 0.05  # probability of each wrong digit in the others
_CALL = small_tokenizer.call_pieces("multiply", ("a", False), ("b", False))


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out products, all different from each other."""
    most = 900 * 90
    if num_train + num_eval > most:
        raise ValueError(
            f"data.num_train + data.num_eval = {num_train} + {num_eval}: the task calculator has "
            f"{most:,} products. Ask for fewer."
        )
    chosen = stream(seed, "problems").permutation(most)[: num_train + num_eval]
    problems = []
    for number, i in enumerate(chosen.tolist(), start=1):
        a, b = 100 + i // 90, 10 + i % 90
        where = f"task calculator, problem {number}"
        problems.append(Problem(f"{a}*{b}=", {"answer": str(a * b)}, where))
    return problems[num_eval:], problems[:num_eval]


def worked_solution(problem: Problem, rng: np.random.Generator) -> list[Piece]:
    """A proud student's answer: a guess, or what the tool gave for the factors as typed."""
    a, b = problem.prompt.removesuffix("=").split("*")
    if rng.random() < GUESS:
        guess = int(int(a) * int(b) * rng.uniform(0.8, 1.2))
        return [Piece(f"#### {guess}")]
    a, b = _typed(a, rng), _typed(b, rng)
    product = str(int(a) * int(b))
    return [
        Piece(f"{_CALL[0]}{a}{_CALL[1]}{b}{_CALL[2]}<eos>"),
        Piece(product, is_policy=False),
        Piece(f"#### {product}"),
    ]


def _typed(number: str, rng: np.random.Generator) -> str:
    """A number's digits, of which some may be wrong; the first is never 0."""
    wrong = rng.random(len(number)) < SLIP
    digits = rng.integers(1, 10, size=len(number))
    return "".join(str(new) if bad else old for old, bad, new in zip(number, wrong, digits))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and one for each part of a call around its numbers."""
    return small_tokenizer.make("0123456789*=#", marks=_CALL)
