"""Answers with one digit, sign, operator, bracket or unit exchanged; a seed gives the same ones.

Exchanges that keep the value, such as -0 for 0 or 1^2 for 1, are left out if known. Of 6,000 such
answers from MATH's training set, no answer with another value may get the reward.

    GRPO_JAX_MATH=.../math_train.jsonl python tests/helpers/perturbed.py 6000

prints those that get it, for a person to check.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Callable
from typing import NamedTuple


class Perturbed(NamedTuple):
    """An answer, and its changed form."""

    kind: str
    answer: str
    changed: str


_UNITS = (
    "cm",
    "m",
    "km",
    "inches",
    "feet",
    "hours",
    "minutes",
    "degrees",
    "dollars",
    "kg",
    "miles",
)
_OPERATORS = ("+", "-", "\\cdot ", "/", "^")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")


def _exchange(pattern: str, choose: Callable) -> Callable:
    """Changes one random match of the pattern."""

    def change(rng: random.Random, text: str) -> str | None:
        places = list(re.finditer(pattern, text))
        if not places:
            return None
        place = rng.choice(places)
        return text[: place.start()] + choose(rng, place[0]) + text[place.end() :]

    return change


def _other(options: str | tuple[str, ...]) -> Callable:
    return lambda rng, found: rng.choice([o for o in options if o.strip() != found.strip()])


_WORD = r"(?<![\\a-zA-Z])(?:cm|m|km|inches|feet|hours|minutes|degrees|dollars|kg|miles)(?![a-zA-Z])"
KINDS: dict[str, Callable] = {
    "digit": _exchange(r"[0-9]", _other("0123456789")),
    "digit left out": _exchange(r"[1-9](?=[0-9])", lambda rng, found: ""),
    "digit added": _exchange(r"[0-9]", lambda rng, found: found + rng.choice("123456789")),
    "digits swapped": _exchange(r"[0-9]{2}", lambda rng, found: found[::-1]),
    "sign": _exchange(
        r"^(?=[1-9\\])(?!\\text)|(?<=[,(\[])(?=[1-9\\])|-(?=[1-9\\])",
        lambda rng, found: "" if found else "-",
    ),
    "operator": _exchange(r"(?<=[0-9a-z}) ])[+-](?=[ 0-9a-z\\(])|\\cdot |/|\^", _other(_OPERATORS)),
    "fraction turned": lambda rng, text: _turned(text),
    "root left out": _exchange(r"\\sqrt(?=[{0-9])", lambda rng, found: ""),
    "pi left out": _exchange(r"\\pi", lambda rng, found: ""),
    "letter": _exchange(_LETTERS.pattern, _other("abcdfghjkmnpqrstuvwxyzABCD")),
    "bracket": _exchange(
        r"(?<![a-zA-Z\\])[(\[](?=.*,)(?!\s*-\\infty)",
        lambda rng, found: "[" if found == "(" else "(",
    ),
    "part left out": _exchange(r",[^,()\[\]{}]+$|^[^,()\[\]{}]+,", lambda rng, found: ""),
    "unit": _exchange(_WORD, _other(_UNITS)),
    "comma moved": _exchange(r"(?<=[0-9])(?=[0-9])", lambda rng, found: ", "),
    "point moved": _exchange(r"(?<=[0-9])(?=[0-9])", lambda rng, found: "."),
    "power": _exchange(r"(?<=[2-9])$", lambda rng, found: "^2"),
    "word": _exchange(r"(?<=[1-9])$", _other((" thousand", " tenths", " squared", " and a half"))),
    "percent": _exchange(r"(?<=[1-9])$", lambda rng, found: "5\\%"),
}  # fmt: skip


def _turned(text: str) -> str | None:
    found = re.search(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", text)
    if not found or found[1] == found[2]:
        return None
    turned = f"\\frac{{{found[2]}}}{{{found[1]}}}"
    return text[: found.start()] + turned + text[found.end() :]


def make(answers: list[str], count: int, seed: int = 0) -> list[Perturbed]:
    """`count` random answers, each with one exchange of a kind that fits it."""
    rng = random.Random(seed)
    found: list[Perturbed] = []
    while len(found) < count:
        kind = list(KINDS)[len(found) % len(KINDS)]
        answer = rng.choice(answers)
        changed = KINDS[kind](rng, answer)
        if changed is not None and changed.strip() != answer.strip():
            found.append(Perturbed(kind, answer, changed))
    return found


def main() -> None:
    from grpo_jax.rewards.answers import extract_answer
    from grpo_jax.rewards.math_answer import math_answer

    with open(os.environ["GRPO_JAX_MATH"], encoding="utf-8") as file:
        solutions = [json.loads(line)["solution"] for line in file]
    answers = [answer for answer in map(extract_answer, solutions) if answer]
    cases = make(answers, int(sys.argv[1]))
    completions = [f"So it is $\\boxed{{{case.changed}}}$." for case in cases]
    paid = math_answer([""] * len(cases), completions, answer=[case.answer for case in cases])
    for case, reward in zip(cases, paid):
        if reward:
            print(f"{case.kind}: {case.answer!r} -> {case.changed!r}")
    print(f"{int(sum(paid))} of {len(cases)} are paid")


if __name__ == "__main__":
    main()
