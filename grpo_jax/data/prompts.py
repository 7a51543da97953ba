"""Which problems stand at a step, and their prompts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.data.problems import Messages, Problem


def prompt_indices(seed: int, step: int, num_problems: int, per_step: int) -> np.ndarray:
    """Numbers of the problems of one step, int64 [per_step]: a function of (seed, step) alone.

    Steps are consecutive slices of one permutation per epoch, joined end to end: every epoch
    visits each problem exactly once, and no problem is left out where `per_step` does not divide
    `num_problems`. Within a step a problem can then stand twice only where the step straddles two
    epochs, or where `per_step` exceeds `num_problems`.
    """
    assert num_problems > 0, "there are no problems"
    position = step * per_step + np.arange(per_step)
    epoch, place = np.divmod(position, num_problems)
    index = np.empty(per_step, np.int64)
    for e in np.unique(epoch):
        # The stream is named after the seed and the epoch, so that a resumed run rebuilds it.
        order = np.random.default_rng([seed, int(e)]).permutation(num_problems)
        index[epoch == e] = order[place[epoch == e]]
    return index


def encode(problems: Sequence[Problem], tokenizer: Any, max_prompt_tokens: int) -> list[list[int]]:
    """Token ids of each prompt: a text as the tokenizer encodes it, messages by its chat template.

    The template adds the opening of the assistant's turn. Raises ValueError when a prompt is
    messages and the tokenizer has no template for them, when one encodes to no tokens, and, naming
    data.max_prompt_tokens, when any is longer than `max_prompt_tokens`.
    """
    rows = [_encode_one(i, p.prompt, tokenizer) for i, p in enumerate(problems)]
    for i, ids in enumerate(rows):
        if not ids:
            raise ValueError(
                f"Problem {i} encodes to no tokens, and between 1 and data.max_prompt_tokens = "
                f"{max_prompt_tokens} are needed. It starts {_start(problems[i].prompt)}."
            )
    too_long = [i for i, ids in enumerate(rows) if len(ids) > max_prompt_tokens]
    if too_long:
        first, longest = too_long[0], max(len(ids) for ids in rows)
        raise ValueError(
            f"data.max_prompt_tokens = {max_prompt_tokens}, but problem {first} has "
            f"{len(rows[first])} tokens; it starts {_start(problems[first].prompt)}. "
            f"{len(too_long)} of {len(rows)} problems are longer, the longest with {longest} "
            f"tokens. Set data.max_prompt_tokens to at least {longest}, or leave those out."
        )
    return rows


def _encode_one(row: int, prompt: str | Messages, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    try:
        # Named, since the default differs by version: 5 gives a dict, 4 gave the ids.
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise ValueError(
            f"Problem {row} is a list of messages, which the tokenizer's template did not take "
            f"({type(error).__name__}: {str(error)[:200]}). It starts {_start(prompt)}. Use a "
            "tokenizer with a chat template, or write each prompt as one text."
        ) from error
    return list(encoded["input_ids"])


def _start(prompt: str | Messages, limit: int = 80) -> str:
    text = repr(prompt)
    return text if len(text) <= limit else f"{text[:limit]}..."
