"""The problems of a step, and their prompts as tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from grpo_jax.data import streams, templates
from grpo_jax.data.chats import Messages
from grpo_jax.data.problems import Problem
from grpo_jax.messages.values import cut


def prompt_indices(seed: int, step: int, num_problems: int, per_step: int) -> np.ndarray:
    """Numbers of the problems of one step, int64 [per_step]: a function of (seed, step) alone.

    Steps are consecutive slices of one permutation per epoch, joined end to end: every epoch visits
    each problem exactly once, and no problem is left out if `per_step` does not divide
    `num_problems`. Within a step a problem can occur twice only if the step spans two epochs, or if
    `per_step` exceeds `num_problems`.
    """
    assert num_problems > 0, "there are no problems"
    position = step * per_step + np.arange(per_step)
    epoch, place = np.divmod(position, num_problems)
    index = np.empty(per_step, np.int64)
    for e in np.unique(epoch):
        order = streams.stream(seed, "order", int(e)).permutation(num_problems)
        index[epoch == e] = order[place[epoch == e]]
    return index


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Problems with the token ids of their prompts, and counts of prompts over the limit."""

    problems: list[Problem]
    prompt_ids: list[list[int]]
    num_dropped: int = 0
    num_truncated: int = 0
    reads: frozenset[str] | None = None  # names that the chat template reads; None without one


def encode(
    problems: Sequence[Problem],
    tokenizer: Any,
    max_prompt_tokens: int,
    overlong: str = "refuse",
    *,
    now: datetime | None = None,
    on_text: Callable[[int, int], None] = lambda done, total: None,
) -> Encoded:
    """The problems with their prompts as tokens.

    The tokenizer encodes texts, and its chat template writes messages with the opening of the
    assistant's turn. If that turn has begun already, it stays open. A text that begins with the
    begin-of-text token does not get it again.

    `overlong` says what to do with prompts longer than `max_prompt_tokens`: "drop" leaves the
    problem out; "truncate" keeps the last tokens, so a chat loses its opening and system message
    first; "refuse" raises. `now`: the time that templates see; None: the current time. `on_text` is
    called while chats are rendered, with the number done and the total.

    Raises ValueError, naming the problem by its file and row, if a prompt is messages and the
    tokenizer has no template for them, if one holds half of a character or encodes to no tokens, if
    one is too long and `overlong` is "refuse", and if "drop" would leave nothing.
    """
    rows, reads = _encode_all(problems, tokenizer, now, on_text)
    for problem, ids in zip(problems, rows):
        if not ids:
            raise ValueError(
                f"The prompt of {_name(problem)} encodes to no tokens, and between 1 and "
                f"data.max_prompt_tokens = {max_prompt_tokens} are needed. "
                f"It starts {_start(problem.prompt)}."
            )
    too_long = [i for i, ids in enumerate(rows) if len(ids) > max_prompt_tokens]
    if overlong == "truncate":
        kept = [ids[-max_prompt_tokens:] for ids in rows]
        return Encoded(list(problems), kept, num_truncated=len(too_long), reads=reads)
    if too_long and (overlong == "refuse" or len(too_long) == len(rows)):
        raise _too_long(problems, rows, too_long, max_prompt_tokens, overlong)
    kept = [i for i, ids in enumerate(rows) if len(ids) <= max_prompt_tokens]
    return Encoded(
        [problems[i] for i in kept],
        [rows[i] for i in kept],
        num_dropped=len(too_long),
        reads=reads,
    )


def _encode_all(
    problems: Sequence[Problem],
    tokenizer: Any,
    now: datetime | None,
    on_text: Callable[[int, int], None],
) -> tuple[list[list[int]], frozenset[str] | None]:
    """Ids of every prompt, and the names that the chat template reads (None without one).

    One call for texts and one for chats, since fast tokenizers spread a call over the cores.
    """
    rows: list[list[int]] = [[]] * len(problems)
    texts = [i for i, p in enumerate(problems) if isinstance(p.prompt, str)]
    chats = [i for i, p in enumerate(problems) if not isinstance(p.prompt, str)]
    rendered = _render([problems[i] for i in chats], tokenizer, now, on_text) if chats else None
    for index, prompts, special in (
        (texts, [problems[i].prompt for i in texts], True),
        # Templates write the special tokens themselves.
        (chats, rendered.texts if rendered else [], False),
    ):
        for i, text in zip(index, prompts):
            refuse_half(text, f"The prompt of {_name(problems[i])}")
        if index:
            encoded = tokenizer(prompts, add_special_tokens=special, verbose=False)
            for i, ids in zip(index, encoded["input_ids"]):
                rows[i] = list(ids)
    written = [problems[i].prompt for i in texts]
    for i, ids in zip(texts, without_second_start(written, [rows[i] for i in texts], tokenizer)):
        rows[i] = ids
    return rows, rendered.reads if rendered else None


def refuse_half(text: str, what: str) -> None:
    """Raises ValueError for a text with half of a character; `what` names it."""
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"{what} holds {half[0]!r}, half of a character, which has no tokens. It starts "
            f"{_start(text)}. Write the whole character."
        )


def without_second_start(
    texts: Sequence[str], rows: Sequence[list[int]], tokenizer: Any
) -> list[list[int]]:
    """Tokens of texts; one that begins with the begin-of-text token does not have it twice."""
    begin = tokenizer.bos_token
    is_twice = lambda text, ids: begin and text.startswith(begin) and ids[:1] == ids[1:2]  # noqa: E731
    return [ids[1:] if is_twice(text, ids) else ids for text, ids in zip(texts, rows)]


def _render(
    problems: list[Problem],
    tokenizer: Any,
    now: datetime | None,
    on_text: Callable[[int, int], None],
) -> templates.Rendered:
    """Renders chats with the tokenizer's template."""
    try:
        return templates.render(
            tokenizer,
            [problem.prompt for problem in problems],
            [problem.arguments for problem in problems],
            now=now,
            on_text=lambda done: on_text(done, len(problems)),
        )
    except templates.TemplateError as error:
        problem = problems[error.number]
        if error.missing and not tokenizer.chat_template:
            raise ValueError(
                f"The prompt of {_name(problem)} is a list of messages, and the tokenizer has no "
                f"chat template. It starts {_start(problem.prompt)}. Use a tokenizer with one, or "
                "write each prompt as one text and leave data.chat False."
            ) from error
        raise ValueError(
            f"The prompt of {_name(problem)} is a list of messages, which the tokenizer's template "
            f"did not accept ({error}). It starts {_start(problem.prompt)}. "
            f"{_remedy(problem, error)}"
        ) from error


def _remedy(problem: Problem, error: templates.TemplateError) -> str:
    if error.missing:
        return (
            "Use a tokenizer with a chat template, or write each prompt as one text and leave "
            "data.chat False."
        )
    system = next((m for m in problem.prompt if m["role"] == "system"), None)
    if system and "system" in str(error).lower():
        text = str(system.get("content")).replace("{", "{{").replace("}", "}}")
        text = cut(repr(f"{text}\n\n{{prompt}}"), 200)
        return (
            "A template without system messages takes that text in the user's message: leave "
            f"data.system_prompt empty, and set data.prompt_template = {text}; where the rows are "
            "messages, move it there."
        )
    return (
        "Mend the row, or give the template what it asks for in data.chat_template_kwargs or a "
        "column `tools` or `chat_template_kwargs`."
    )


def _too_long(
    problems: Sequence[Problem],
    rows: list[list[int]],
    too_long: list[int],
    limit: int,
    overlong: str,
) -> ValueError:
    first, longest = too_long[0], max(len(ids) for ids in rows)
    remedy = f"Set data.max_prompt_tokens to at least {longest}"
    if overlong == "refuse":
        remedy += ', or data.overlong to "drop" or "truncate"'
    return ValueError(
        f"data.max_prompt_tokens = {limit}, but the prompt of {_name(problems[first])} "
        f"has {len(rows[first])} tokens; it starts {_start(problems[first].prompt)}. "
        f"{len(too_long)} of {len(rows)} problems are longer, the longest with {longest} tokens"
        f"{', and data.overlong = drop would leave none' * (overlong == 'drop')}. {remedy}."
    )


def _name(problem: Problem) -> str:
    return problem.where or "an unnamed problem"


def _start(prompt: str | Messages, limit: int = 80) -> str:
    text = repr(prompt)
    return text if len(text) <= limit else f"{text[:limit]}..."
