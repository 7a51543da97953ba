"""Generated tasks: problems with checkable answers that need no download.

A task is a module here with three functions:

    generate(num_train, num_eval, seed) -> (train, held_out)     lists of Problem, no prompt in both
    worked_solution(problem, rng) -> str | list[Piece]           one imperfect demonstration
    make_tokenizer() -> PreTrainedTokenizerFast                  for a model made from scratch

and for training on preferences

    preference_pair(problem, rng) -> (better, worse)             two answers, which differ
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import NamedTuple


class Piece(NamedTuple):
    """A part of a demonstration that is a conversation with an environment.

    A turn of the policy ends in its stop token, but for the last, which gets it.
    """

    text: str
    is_policy: bool = True  # trained on; the environment's texts are not


def whole(solution: str | list[Piece]) -> str:
    """A demonstration as one text, with what the environment says in it."""
    if isinstance(solution, str):
        return solution
    return "".join(piece.text for piece in solution)


def load(name: str) -> ModuleType:
    """The task of this name; ValueError with the known names if there is none."""
    known = sorted(m.name for m in pkgutil.iter_modules(__path__))
    if name not in known:
        raise ValueError(f"data.task = {name!r}: there is no such task. Known: {', '.join(known)}.")
    return importlib.import_module(f"{__name__}.{name}")
