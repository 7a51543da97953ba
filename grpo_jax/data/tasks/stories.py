"""Beginnings of children's stories: "Once upon a time, there was a little dog named Tim."

They are for models that can tell a story, such as those trained on TinyStories (Eldan and Li 2023,
arXiv:2305.07759), and for rewards that judge one. There are no worked solutions: a new model cannot
be made from this task.
"""

from __future__ import annotations

import itertools

from grpo_jax.data.problems import Problem
from grpo_jax.data.streams import stream

_ADJECTIVES = "little big brave shy clever funny kind young quiet happy hungry sleepy".split()
_HEROES = "girl boy dog cat bird bear bunny frog mouse fish duck fox pony turtle".split()
_NAMES = (
    "Lily Tim Sue Tom Mia Ben Anna Max Lucy Sam Sara Jack Amy Bob Jane Leo Molly Spot Daisy Fred"
).split()
_TURNS = (
    "One day,",
    "One sunny day,",
    "Every day,",
    "One morning,",
)


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out beginnings, all different; ValueError if there are not enough."""
    choices = list(itertools.product(_ADJECTIVES, _HEROES, _NAMES, _TURNS))
    if num_train + num_eval > len(choices):
        raise ValueError(
            f"data.num_train + data.num_eval = {num_train} + {num_eval}: the task stories has "
            f"{len(choices):,} beginnings. Ask for fewer."
        )
    order = stream(seed, "problems").permutation(len(choices))
    problems = [
        Problem(_beginning(*choices[i]), {}, f"task stories, problem {n}")
        for n, i in enumerate(order[: num_train + num_eval])
    ]
    return problems[num_eval:], problems[:num_eval]


def _beginning(adjective: str, hero: str, name: str, turn: str) -> str:
    return f"Once upon a time, there was a {adjective} {hero} named {name}. {turn}"
