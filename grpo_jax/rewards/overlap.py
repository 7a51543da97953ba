"""Rewards for what a completion has in common with a reference: n-grams, and facts.

BLEU and ROUGE are computed by sacrebleu and rouge-score, so that the values are those of papers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.completions import replies
from grpo_jax.rewards.exact import normalise, number
from grpo_jax.rewards.text import accepted, text_fault

MAX_CHARS = 20_000  # of a completion that is compared; the cost grows with both lengths
_ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_NUMBER = re.compile(r"(?<![\w.,])[-+]?[0-9][0-9,]{0,30}(?:\.[0-9]{1,30})?(?![\w])")
_WORD = re.compile(r"[^\W\d_](?:[\w'’-]{0,40}\w)?")
# Words that begin sentences and are no names.
_COMMON = frozenset(
    "the a an it he she they we you this that these those his her its their our my your in on at "
    "of to for and but or so if when while there here is are was were what who which how why yes "
    "no not as by from with after before since because first second next then finally also "
    "however therefore thus hence step answer let now one all both each".split()
)
_BEGINS = re.compile(r"(?:\A|[.!?:;\n•*#>\"“(-])[\s*_\"“(]{0,9}\Z")


def bleu(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """BLEU of each completion against its answer, or against a list of answers, in 0..1.

    sacrebleu's for single sentences, with effective order, over 100 (Papineni et al. 2002). Of the
    reply after thinking the first 20,000 characters are read. Raises ValueError if a row holds no
    answer.
    """
    scorer = _bleu()
    score = lambda text, answers: scorer.sentence_score(text, list(answers)).score / 100  # noqa: E731
    return _compared(prompts, completions, answer, rendered_prompts, score)


def rouge(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    kind: str = "rougeL",
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """ROUGE of each completion against its answer, the best of a list of answers, in 0..1.

    The F-measure of rouge-score without stemming (Lin 2004); `kind` is rouge1, rouge2, rougeL or
    rougeLsum. Its words are the letters a to z and digits, so other scripts give 0. Of the reply
    after thinking the first 20,000 characters are read. Raises ValueError if a row holds no answer.
    """
    scorer = _rouge(kind)

    def score(text: str, answers: Sequence[str]) -> float:
        return max(float(scorer.score(a, text)[kind].fmeasure) for a in answers)

    return _compared(prompts, completions, answer, rendered_prompts, score)


def fact_overlap(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float | None]:
    """F1 between the facts of each completion and those of its answer, in 0..1.

    Facts are numbers, equal by value, and names: words with a capital letter. One that begins a
    sentence counts if the other text has it too. So a missing fact costs as much as an invented
    one. The best of a list of answers counts. None for an answer without facts.
    """
    texts = replies(prompts, completions, rendered_prompts)
    rewards: list[float | None] = []
    for text, value in zip(texts, answer):
        found = [_fact_f1((text or "")[:MAX_CHARS], reference) for reference in accepted(value)]
        known = [f1 for f1 in found if f1 is not None]
        rewards.append(max(known) if known else None)
    return rewards


def _refuse_kind(kind: Any = "rougeL") -> None:
    if kind not in _ROUGES:
        raise ValueError(f"kind = {kind!r} must be one of {', '.join(_ROUGES)}")


bleu.needs, bleu.options = ("sacrebleu",), ()
rouge.needs, rouge.options, rouge.refuse = ("rouge_score",), ("kind",), _refuse_kind
fact_overlap.options = ()
for _reward in (bleu, rouge, fact_overlap):
    _reward.column_faults = {"answer": text_fault}


def _compared(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None,
    score: Callable[[str, Sequence[str]], float],
) -> list[float]:
    texts = replies(prompts, completions, rendered_prompts)
    return [
        score((text or "")[:MAX_CHARS], accepted(value))
        for text, value in zip(texts, answer, strict=True)
    ]


@functools.cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


@functools.cache
def _rouge(kind: str) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([kind], split_summaries=kind == "rougeLsum")


def _fact_f1(text: str, reference: str) -> float | None:
    """F1 of the facts of a text and its reference; None if the reference has none."""
    (names, first), (wanted, wanted_first) = _names(text), _names(reference)
    one = _numbers(text) | names | (first & (wanted | wanted_first))
    other = _numbers(reference) | wanted | (wanted_first & (names | first))
    other = other or wanted_first
    return 2 * len(one & other) / (len(one) + len(other)) if other else None


def _numbers(text: str) -> set[Fraction]:
    found = (number(normalise(match.rstrip(","))) for match in _NUMBER.findall(text))
    return {value for value in found if value is not None}


def _names(text: str) -> tuple[set[str], set[str]]:
    """Words with a capital letter, in lower case: within sentences, and at their beginnings."""
    names, first = set(), set()
    for match in _WORD.finditer(text):
        word = match[0]
        if not word[0].isupper() or word == "I":
            continue
        begins = _BEGINS.search(text[max(0, match.start() - 10) : match.start()])
        is_plain = not (len(word) > 1 and word[1:].lower() != word[1:])  # NATO, McDonald
        (first if begins and is_plain else names).add(word.casefold().removesuffix("'s"))
    return names, first - names - _COMMON
