"""Sums of several terms, computed step by step: "8+7-4+9=" has the answer 20.

A small model cannot give such an answer at once, but it can compute one running total after the
other. The demonstrations are those of sloppy students: most skip the steps and guess, the others
write the steps with occasional errors. A model that imitates them mostly guesses; reinforcement
learning finds that writing the steps pays.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from grpo_jax.data.problems import Problem
from grpo_jax.data.streams import stream

MIN_TERMS, MAX_TERMS = 4, 5  # of a problem, with its first number
MAX_TOTAL = 20  # running totals stay within 0 and this
SHORTCUT = 0.6  # share of demonstrations that guess without steps
SLIP = 0.04  # probability of a wrong result in each step of the others


def _problem(rng: np.random.Generator) -> Problem:
    total = int(rng.integers(1, 10))
    text = str(total)
    for _ in range(int(rng.integers(MIN_TERMS, MAX_TERMS + 1)) - 1):
        term = int(rng.integers(1, 10))
        add = total < term or (total + term <= MAX_TOTAL and rng.random() < 0.5)
        total += term if add else -term
        text += f"{'+' if add else '-'}{term}"
    return Problem(prompt=f"{text}=", columns={"answer": str(total)})


def generate(num_train: int, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, all different from each other."""
    rng = stream(seed, "problems")
    unique: dict[str, Problem] = {}
    while len(unique) < num_train + num_eval:
        problem = _problem(rng)
        unique.setdefault(problem.prompt, problem)
    problems = [
        dataclasses.replace(problem, where=f"task arithmetic, problem {number}")
        for number, problem in enumerate(unique.values(), start=1)
    ]
    return problems[num_eval:], problems[:num_eval]


def worked_solution(problem: Problem, rng: np.random.Generator) -> str:
    """A sloppy student's answer: a guess, or the steps with occasional errors."""
    if rng.random() < SHORTCUT:
        return _guess(problem, rng)
    return _steps(problem, rng, SLIP)


def preference_pair(problem: Problem, rng: np.random.Generator) -> tuple[str, str]:
    """The steps without errors, and what is worse: a guess, or steps with at least one error."""
    better = _steps(problem, rng, 0.0)
    worse = _guess(problem, rng) if rng.random() < SHORTCUT else better
    while worse == better:
        worse = _steps(problem, rng, 10 * SLIP)
    return better, worse


def _guess(problem: Problem, rng: np.random.Generator) -> str:
    answer = int(problem.columns["answer"])
    guess = int(np.clip(answer + rng.integers(-9, 10), 0, MAX_TOTAL))
    return f"#### {guess}"


def _steps(problem: Problem, rng: np.random.Generator, slip: float) -> str:
    """The running totals, each wrong with the probability `slip`."""
    expression = problem.prompt.removesuffix("=").replace("-", "+-")
    total, *terms = (int(term) for term in expression.split("+"))
    lines = []
    for term in terms:
        result = total + term
        if rng.random() < slip:
            result = max(0, result + int(rng.choice([-2, -1, 1, 2])))
        lines.append(f"{total}{term:+d}={result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and one for the answer marker.

    A plain tokenizer that every version of transformers reads the same way. It splits text like
    Qwen2, the model's family, because version 5 applies Qwen2's splitting to every folder of that
    family, whatever the folder says.
    """
    tokens = ["<pad>", "<eos>", *"0123456789+-=#", "Ġ", "Ċ", "##", "####"]  # Ġ a space, Ċ a newline
    rules = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("#", "#"), ("##", "##")],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # decoders have no token types
    )
