"""Rewards for a completion's format: answer and thinking in their places, right or wrong."""

from __future__ import annotations

from typing import Any

from grpo_jax.rewards.completions import after_thinking, begin_in_thinking, text_of

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def answer_format(
    prompts: list[Any],
    completions: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion with exactly one "#### answer", in its last line, else 0.0.

    Text may stand before the marker on that line. Blank lines after it are allowed. Thinking that
    does not end has no answer, also if the prompt opened it.
    """
    thinking = begin_in_thinking(prompts, rendered_prompts)
    texts = [text_of(completion) for completion in completions]
    return [
        float(after_thinking(text, inside) is not None and _is_well_formed(text))
        for text, inside in zip(texts, thinking, strict=True)
    ]


def think_format(
    prompts: list[Any],
    completions: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion of the form "<think>...</think> answer", else 0.0.

    It has exactly one pair of tags, begins with the first tag, and has text after the second. TRL's
    `think_format_reward` also takes an empty answer and a second </think>. If the prompt as the
    model read it (`rendered_prompts`) leaves a <think> open, as some chat templates do, that tag
    counts as the completion's.
    """
    texts = _with_opening(prompts, completions, rendered_prompts)
    return [float(_thought(text) is not None) for text in texts]


def think_answer_format(
    prompts: list[Any],
    completions: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for "<think>...</think><answer>...</answer>" with only spaces besides, else 0.0.

    The form of DeepSeek-R1-Zero (DeepSeek-AI 2025, arXiv:2501.12948, table 1): exactly one of each
    tag, and an answer that is not blank. A prompt may open the thinking, as in `think_format`.
    """
    texts = _with_opening(prompts, completions, rendered_prompts)
    return [float(_is_tagged(_thought(text))) for text in texts]


def _is_well_formed(completion: str) -> bool:
    _, marker, answer = completion.rstrip().partition("####")
    answer = answer.strip(" \t") if marker else ""
    return bool(answer) and "####" not in answer and "\n" not in answer and answer[0] != "#"


def _with_opening(
    prompts: list[Any], completions: list[Any], rendered_prompts: list[str] | None
) -> list[str]:
    """Texts of the completions, after the <think> that the end of their prompt opened."""
    thinking = begin_in_thinking(prompts, rendered_prompts)
    return [
        "<think>" * inside + text_of(c) for c, inside in zip(completions, thinking, strict=True)
    ]


def _thought(text: str) -> str | None:
    """The text after the thinking, stripped; None if the form is wrong or there is no text."""
    text = text.strip()
    if not text.startswith("<think>") or text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    return text.partition("</think>")[2].strip() or None


def _is_tagged(answer: str | None) -> bool:
    if answer is None or not (answer.startswith("<answer>") and answer.endswith("</answer>")):
        return False
    inside = answer[len("<answer>") : -len("</answer>")]
    return bool(inside.strip()) and not any(tag in inside for tag in _TAGS)
