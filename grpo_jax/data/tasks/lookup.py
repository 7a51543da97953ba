"""Questions that one look into a corpus answers: "Q: where was Ada Novak born?"

Each question is about a corpus of its own facts (`data/corpora.py`); those of held-out questions
are never trained on, nor are their names. A tool searches the corpus. Most demonstrations guess;
the others search for a name, sometimes for a wrong one, and read the answer off.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerFast

from grpo_jax.data import corpora, small_tokenizer
from grpo_jax.data.corpora import Person
from grpo_jax.data.problems import Problem
from grpo_jax.data.streams import stream
from grpo_jax.data.tasks import Piece

GUESS = 0.6  # share of demonstrations without a search
SLIP = 0.1  # probability of a wrong word in a query
QUESTIONS = {
    "born": "Q: where was {name} born?",
    "firm": "Q: where does {name} work?",
}
CALL = small_tokenizer.call_pieces("search", ("query", True))


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out questions, of different corpora."""
    return questions("lookup", QUESTIONS, num_train, num_eval, seed)


def questions(
    task: str, forms: dict[str, str], num_train: int, num_eval: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Questions of the given forms, by the fact of a person that answers each.

    Training and held-out questions have corpora of their own, and names.
    """
    found: list[list[Problem]] = [[], []]
    corpus = 0
    for part, num in ((1, num_eval), (0, num_train)):
        while len(found[part]) < num:
            name = f"{seed}-{corpus}"
            corpus += 1
            rng = stream(seed, "problems", 10**6 + corpus)
            people = corpora.make(name).people
            for i in rng.permutation(len(people)):
                fact = str(rng.choice(list(forms)))
                name_of = people[i].name
                if corpora.is_held_out(name_of) != part or len(found[part]) == num:
                    continue
                prompt = forms[fact].format(name=name_of)
                columns = {"corpus": name, "person": int(i), "fact": fact}
                columns["answer"] = getattr(people[i], fact)
                where = f"task {task}, problem {len(found[0]) + len(found[1]) + 1}"
                found[part].append(Problem(prompt, columns, where))
    return found[0], found[1]


def worked_solution(problem: Problem, rng: np.random.Generator) -> list[Piece]:
    """A guess, or a search for the person and the answer that it gives."""
    columns = problem.columns
    if rng.random() < GUESS:
        names = corpora.FIRMS if columns["fact"] == "firm" else corpora.TOWNS
        return [Piece(f"#### {rng.choice(names)}")]
    corpus = corpora.make(columns["corpus"])
    found = slipped(columns["person"], corpus.people, rng)
    return [
        *looked_up(found.name, corpus.documents[corpus.people.index(found)]),
        Piece(f"#### {getattr(found, columns['fact'])}"),
    ]


def slipped(person: int, people: tuple[Person, ...], rng: np.random.Generator) -> Person:
    """The person, or by a slip another one."""
    if rng.random() < SLIP:
        person = int(rng.integers(len(people)))
    return people[person]


def looked_up(query: str, document: str) -> list[Piece]:
    """A search, and what it finds."""
    return [Piece(f"{CALL[0]} {query}{CALL[1]}<eos>"), Piece(document, is_policy=False)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word and name, and one for each part of a call around its query."""
    words = "where was born does work works in and at is which town".split()
    names = [*corpora.FIRST, *corpora.LAST, *corpora.TOWNS, *corpora.FIRMS]
    return small_tokenizer.make("Q:?.-#", [*words, *names], CALL)
