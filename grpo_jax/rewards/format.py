"""Rewards for a completion's form, right or wrong: the answer and the thinking in their places."""

from __future__ import annotations

from typing import Any

from grpo_jax.rewards.completions import last_text_of, text_of

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def answer_format(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1.0 for each completion whose last line, and no other place, says "#### answer", else 0.0.

    Text may stand before the marker on that line. Blank lines after it are no offence.
    """
    return [float(_is_well_formed(text_of(completion))) for completion in completions]


def think_format(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1.0 for each completion of the form "<think>...</think> answer", else 0.0.

    Exactly one pair of tags; the completion opens with the first and has text after the second.
    TRL's `think_format_reward` also takes an empty answer and a second </think>. Some chat
    templates write <think> at the end of the prompt; there the completion opens without it.
    """
    texts = _with_opening(prompts, completions)
    return [float(_thought(text) is not None) for text in texts]


def think_answer_format(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1.0 for "<think>...</think><answer>...</answer>" and nothing besides but spaces, else 0.0.

    The form of DeepSeek-R1-Zero (DeepSeek-AI 2025, arXiv:2501.12948, table 1): exactly one of each
    tag, and an answer that is not blank. A prompt may end in <think>, as in `think_format`.
    """
    texts = _with_opening(prompts, completions)
    return [float(_is_tagged(_thought(text))) for text in texts]


def _is_well_formed(completion: str) -> bool:
    _, marker, answer = completion.rstrip().partition("####")
    answer = answer.strip(" \t") if marker else ""
    return bool(answer) and "####" not in answer and "\n" not in answer and answer[0] != "#"


def _with_opening(prompts: list[Any], completions: list[Any]) -> list[str]:
    """Texts of the completions, with the <think> that the end of a prompt wrote for them."""
    return [
        "<think>" * last_text_of(prompt).rstrip().endswith("<think>") + text_of(completion)
        for prompt, completion in zip(prompts, completions)
    ]


def _thought(text: str) -> str | None:
    """What follows the thinking, stripped; None where the form is not kept or nothing follows."""
    text = text.strip()
    if not text.startswith("<think>") or text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    return text.partition("</think>")[2].strip() or None


def _is_tagged(answer: str | None) -> bool:
    if answer is None or not (answer.startswith("<answer>") and answer.endswith("</answer>")):
        return False
    inside = answer[len("<answer>") : -len("</answer>")]
    return bool(inside.strip()) and not any(tag in inside for tag in _TAGS)
