"""Notes for the user about the problems, before a model is trained or evaluated on them."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Collection, Sequence

from grpo_jax.data import chats
from grpo_jax.data.problems import Form, Problem

# Column names that data sets use for the model's input.
_LIKE_INPUTS = (
    *("messages", "conversation", "conversations", "question", "problem", "query", "instruction"),
    *("input", "context", "documents", "system", "system_prompt", chats.TOOLS, chats.ARGUMENTS),
)


def of_problems(train: Sequence[Problem], held_out: Sequence[Problem], form: Form) -> list[str]:
    """Notes on repeated problems, and on columns that look like inputs."""
    asked = [p.question for p in train]
    notes = [_repeats(train, asked, "training")]
    if held_out:
        asked_then = [p.question for p in held_out]
        notes.append(_repeats(held_out, asked_then, "held-out"))
        known = set(asked)
        both = sum(question in known for question in asked_then)
        if both:
            notes.append(
                f"{both:,} of the {len(held_out):,} held-out problems have the prompt of a "
                "training problem. The model may have memorized their answers."
            )
    notes.append(_unread(train, form) if train else "")
    return [note for note in notes if note]


def _repeats(problems: Sequence[Problem], asked: list[str], noun: str) -> str:
    counts = collections.Counter(asked)
    if len(counts) == len(asked):
        return ""
    facts: dict[str, set[str]] = {question: set() for question, n in counts.items() if n > 1}
    for problem, question in zip(problems, asked):
        if question in facts:
            facts[question].add(json.dumps(problem.columns, sort_keys=True, default=str))
    most, differ = max(counts.values()), sum(len(found) > 1 for found in facts.values())
    other = f" Of {differ:,} prompts the other columns differ, too." if differ else ""
    return (
        f"the {len(asked):,} {noun} problems have {len(counts):,} different prompts, one of them "
        f"{most:,} times.{other} Each row is used as often as it occurs; intervals count a prompt "
        "once."
    )


def _unread(problems: Sequence[Problem], form: Form) -> str:
    """A note on columns that look like inputs, but are not part of the prompt."""
    first = problems[0]
    named = (*form.renames, *(form.fields if form.prompt_template else ()))
    used = {name.partition(".")[0] for name in named}
    is_chat = not isinstance(first.prompt, str)
    names = [
        name
        for name in _LIKE_INPUTS
        if first.columns.get(name) is not None
        and name not in used
        and not (is_chat and name in (chats.TOOLS, chats.ARGUMENTS))
    ]
    if not names:
        return ""
    return (
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} no part of the prompt: of a row "
        "the model reads `prompt`, and reward functions the other columns. data.columns and "
        "data.prompt_template make another prompt."
    )


def of_template(problems: Sequence[Problem], reads: frozenset[str] | None, form: Form) -> list[str]:
    """Notes on values that the chat template does not read, or reads but does not get.

    `reads`: the names that it reads; None if no prompt is a chat. Raises ValueError for a name in
    `data.chat_template_kwargs` that it does not read.
    """
    names = set(itertools.chain.from_iterable(p.arguments for p in problems))
    return of_names(names, problems[0].columns if problems else (), reads, form)


def of_names(
    names: Collection[str], columns: Collection[str], reads: frozenset[str] | None, form: Form
) -> list[str]:
    """The same, of the names of the values that rows give to the template, and of their columns."""
    if reads is None:
        return []
    unread = [name for name in form.arguments if name not in reads]
    if unread:
        own = sorted(reads - {"messages", "add_generation_prompt"})
        raise ValueError(
            f"data.chat_template_kwargs: the model's chat template does not read `{unread[0]}`. "
            f"It reads {_listed(own) or 'messages alone'}. Take it out, or correct its name."
        )
    names, columns = set(names), set(columns)
    notes = [
        f"the model's chat template does not read `{name}`, which the data gives it: the prompts "
        "are without it."
        for name in sorted(names - reads)
    ]
    notes += [
        f"the model's chat template reads `{name}`, and the data has a column of that name, which "
        f"it does not get. Give it within a column `{chats.ARGUMENTS}`, as TRL does, or rename it."
        for name in sorted(reads & columns - names)
        if name != chats.TOOLS
    ]
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
