"""Rewards for the look of a completion: tags, steps of reasoning, and patterns of your own.

`strict_tags` and `soft_tags` are the `format_reward` and `tag_count_reward` of open-r1 for tags of
any names, `reasoning_steps` is its `reasoning_steps_reward`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.completions import after_thinking, begin_in_thinking, text_of

_STEP = re.compile(r"Step [0-9]+:|\A[0-9]+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
_TAGS = ("think", "answer")


def strict_tags(
    prompts: list[Any],
    completions: list[Any],
    tags: Sequence[str] = _TAGS,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    r"""1.0 for "<think>\n...\n</think>\n<answer>\n...\n</answer>" and nothing else, else 0.0.

    The tags stand in this order, each once and on a line of its own. open-r1's `format_reward` also
    takes tags that are repeated or nested, and what follows the last line. A prompt may open the
    first tag.
    """
    texts = _with_opening(prompts, completions, rendered_prompts, tags)
    return [float(_is_strict(text, tags)) for text in texts]


def soft_tags(
    prompts: list[Any],
    completions: list[Any],
    tags: Sequence[str] = _TAGS,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    r"""Share of the opening and closing tags that stand in a completion exactly once, in 0..1.

    A tag counts with its line feeds: "<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>".
    With the default tags it is open-r1's `tag_count_reward`. A prompt may open the first tag.
    """
    texts = _with_opening(prompts, completions, rendered_prompts, tags)
    marks = _marks(tuple(tags))
    return [sum(text.count(mark) == 1 for mark in marks) / len(marks) for text in texts]


def reasoning_steps(
    prompts: list[Any], completions: list[Any], least: int = 3, **columns: Any
) -> list[float]:
    """Share of `least` marks of a step that a completion has, at most 1.

    Marks are "Step 1:", a number and a period at the start, a line that begins with - or *, and
    "First,", "Second,", "Next,", "Finally,": open-r1's `reasoning_steps_reward`.
    """
    texts = map(text_of, completions)
    return [min(1.0, sum(1 for _ in _STEP.finditer(text)) / least) for text in texts]


def regex(
    prompts: list[Any],
    completions: list[Any],
    pattern: str | list[str],
    whole: bool = False,
    after_think: bool = False,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion in which a regular expression of Python is found, else 0.0.

    `pattern` is one for all rows, bound by the config, or a column. Flags are written in it, as in
    "(?is)...". `whole`: it must match the completion from start to end. `after_think`: it is looked
    for after the last </think>, and thinking that does not end gives 0. A pattern that takes too
    long on a completion fails by time.
    """
    rows = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    thinking = begin_in_thinking(prompts, rendered_prompts)
    rewards = []
    for completion, inside, row in zip(completions, thinking, rows, strict=True):
        text: str | None = text_of(completion)
        if after_think:
            text = after_thinking(text, inside)
        found = _compiled(row)
        look = found.fullmatch if whole else found.search
        rewards.append(float(text is not None and look(text) is not None))
    return rewards


def pattern_fault(value: Any) -> str | None:
    """The fault of a value of `pattern`, a regular expression; None for a valid one."""
    if not isinstance(value, str) or not value:
        return "is null" if value is None else "is no text of a regular expression"
    try:
        _compiled(value)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression ({error})"
    return None


def _refuse_pattern(pattern: Any = "a", **_: Any) -> None:
    if fault := pattern_fault(pattern):
        raise ValueError(f"pattern {fault}")


def _refuse_tags(tags: Any = _TAGS) -> None:
    fine = isinstance(tags, (list, tuple)) and all(isinstance(tag, str) for tag in tags)
    if not fine or not tags or not all(map(str.isidentifier, tags)) or len({*tags}) < len(tags):
        raise ValueError(f"tags = {tags!r} must be a list of different names, without brackets")


def _refuse_least(least: Any = 1) -> None:
    if not isinstance(least, int) or least < 1:
        raise ValueError(f"least = {least!r} steps must be at least 1")


strict_tags.options = soft_tags.options = ("tags",)
strict_tags.refuse = soft_tags.refuse = _refuse_tags
reasoning_steps.options, reasoning_steps.refuse = ("least",), _refuse_least
regex.column_faults, regex.refuse = {"pattern": pattern_fault}, _refuse_pattern
regex.options = ("whole", "after_think")


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(pattern)


def _with_opening(
    prompts: list[Any],
    completions: list[Any],
    rendered_prompts: list[str] | None,
    tags: Sequence[str],
) -> list[str]:
    """Texts of the completions, after the tag that the end of their prompt opened."""
    if tags[0] != "think":
        return [text_of(completion) for completion in completions]
    thinking = begin_in_thinking(prompts, rendered_prompts)
    opened = ["<think>\n" if inside else "" for inside in thinking]
    texts = [text_of(completion) for completion in completions]
    return [
        opening + (text.removeprefix("\n") if opening else text)
        for opening, text in zip(opened, texts, strict=True)
    ]


@functools.cache
def _marks(tags: tuple[str, ...]) -> list[str]:
    """The tags with the line feeds around them, but for the outer ones."""
    marks = [mark for tag in tags for mark in (f"\n<{tag}>\n", f"\n</{tag}>\n")]
    return [marks[0].removeprefix("\n"), *marks[1:-1], marks[-1].removesuffix("\n")]


def _is_strict(text: str, tags: Sequence[str]) -> bool:
    for tag in tags:
        if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
            return False
    rest = text.rstrip()
    for i, tag in enumerate(tags):
        if not rest.startswith(opening := f"<{tag}>\n"):
            return False
        _, closing, rest = rest[len(opening) :].partition(f"\n</{tag}>")
        is_last = i == len(tags) - 1
        if not closing or (rest if is_last else not rest.startswith("\n")):
            return False
        rest = rest.removeprefix("\n")
    return True
