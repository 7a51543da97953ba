"""Questions that take two looks into a corpus: "Q: in which town does Ada Novak work?"

No document says it. One says for which firm Ada Novak works, and another where that firm is: the
second query must be made of the first answer. Otherwise as the task lookup.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerFast

from grpo_jax.data import corpora
from grpo_jax.data.problems import Problem
from grpo_jax.data.tasks import Piece, lookup

GUESS, ONCE = 0.6, 0.1  # shares of demonstrations without a search, and with one alone
QUESTIONS = {"town": "Q: in which town does {name} work?"}


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out questions, of different corpora."""
    return lookup.questions("lookup_twice", QUESTIONS, num_train, num_eval, seed)


def worked_solution(problem: Problem, rng: np.random.Generator) -> list[Piece]:
    """A guess; a search and a guess; or a search for the person, then for the firm."""
    how = rng.random()
    guess = Piece(f"#### {rng.choice(corpora.TOWNS)}")
    if how < GUESS:
        return [guess]
    corpus = corpora.make(problem.columns["corpus"])
    found = lookup.slipped(problem.columns["person"], corpus.people, rng)
    first = lookup.looked_up(found.name, corpus.documents[corpus.people.index(found)])
    if how < GUESS + ONCE:
        return [*first, guess]
    firm = found.firm
    if rng.random() < lookup.SLIP:
        firm = corpus.people[rng.integers(len(corpus.people))].firm
    document = next(d for d in corpus.documents if d.startswith(f"- {firm} is"))
    town = document.removesuffix(".").rpartition(" ")[2]
    return [*first, *lookup.looked_up(firm, document), Piece(f"#### {town}")]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """That of the task lookup."""
    return lookup.make_tokenizer()
