"""Rewards for a completion's words: equal or similar to a text, with required words, not repeated.

`exact_match` and `token_f1` are those of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, section
6.1, and its evaluation script). They read the whole completion after the last </think>, so a config
asks for short answers. Thinking that does not end has no answer, also if the prompt opened it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.completions import replies, text_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion that equals the answer, or one of a list of answers, else 0.0.

    Case, punctuation, the articles a, an and the, and repeated spaces are ignored. Raises
    ValueError if a row holds no answer.
    """
    texts = replies(prompts, completions, rendered_prompts)
    return [
        max(float(text is not None and _tokens(text) == _tokens(a)) for a in accepted(value))
        for text, value in zip(texts, answer)
    ]


def token_f1(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """F1 between the words of each completion and of its answer, the best of a list of answers.

    Words are normalized as in `exact_match`; a word that both have twice counts twice. Raises
    ValueError if a row holds no answer.
    """
    texts = replies(prompts, completions, rendered_prompts)
    return [
        max(0.0 if text is None else word_f1(text, a) for a in accepted(value))
        for text, value in zip(texts, answer)
    ]


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words of a text, in 0..1.

    Words are normalized as in `exact_match`. If one of the two has no words, the score is 1 if the
    other has none either, else 0 (SQuAD 2.0). A text of articles alone keeps them, unlike SQuAD's:
    it may be choice A.
    """
    words, reference_words = _tokens(text), _tokens(reference)
    if not words or not reference_words:
        return float(words == reference_words)
    common = (Counter(words) & Counter(reference_words)).total()
    return 2 * common / (len(words) + len(reference_words))


def mentions(
    prompts: list[Any],
    completions: list[Any],
    words: Sequence[str] | list[Sequence[str]],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """Share of the words that each completion mentions, as whole words and in any case.

    `words` is either one list of words for all rows, bound by the config, or a column with a list
    of words per row. A word may contain spaces. A row without words gives 1.0. Raises ValueError
    for words that are blank or not texts.
    """
    # A column has a list in every row; a bound parameter has none.
    is_column = len(words) == len(completions) and all(isinstance(w, (list, tuple)) for w in words)
    rows = words if is_column else [words] * len(completions)
    texts = replies(prompts, completions, rendered_prompts)
    return [_share(text or "", wanted) for text, wanted in zip(texts, rows)]


def repetition_penalty(
    prompts: list[Any], completions: list[Any], ngram: int = 3, **columns: Any
) -> list[float]:
    """Minus the share of repeated n-grams in each completion; 0.0 if it is too short for one.

    From Yeo et al. 2025 (arXiv:2502.03373, appendix): (distinct n-grams / n-grams) - 1, of words
    between spaces in lower case. Raises ValueError for `ngram` below 1.
    """
    if ngram < 1:
        raise ValueError(f"repetition_penalty: ngram = {ngram} words must be at least 1.")
    return [_repetition(text_of(completion).lower().split(), ngram) for completion in completions]


def text_fault(value: Any) -> str | None:
    """The fault of a value of `answer`, a text or a list of accepted texts; or None."""
    if value is None:
        return "is null"
    if isinstance(value, str):
        return None if _tokens(value) else "is blank, or all punctuation"
    if not isinstance(value, (list, tuple)):
        return f"is a {type(value).__name__}, not a text or a list of texts"
    if not value:
        return "is an empty list"
    if any(isinstance(v, (list, tuple)) for v in value):
        return "is a list of lists, not a text or a list of texts"
    faults = (text_fault(v) for v in value)
    return next((f"is a list of which one {fault}" for fault in faults if fault), None)


def words_fault(value: Any) -> str | None:
    """The fault of a value of `words`, a list of words; None for a valid one."""
    if value is None:
        return "is null"
    if not isinstance(value, (list, tuple)):
        return f"is a {type(value).__name__}, not a list of words"
    for word in value:
        if not isinstance(word, str) or not word.strip():
            return f"holds {word!r}, not a word"
    return None


exact_match.column_faults = {"answer": text_fault}
exact_match.right_or_wrong = True
token_f1.column_faults = {"answer": text_fault}
repetition_penalty.options = ("ngram",)
mentions.column_faults = {"words": words_fault}


def accepted(value: Any) -> Sequence[str]:
    """The accepted texts of a value of `answer`. Raises ValueError if it holds none."""
    if fault := text_fault(value):
        raise ValueError(f"`answer` {fault}: {value!r}")
    return [value] if isinstance(value, str) else value


def _tokens(text: str) -> list[str]:
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return _ARTICLES.sub(" ", text).split() or text.split()  # it may be choice A


def _repetition(words: list[str], n: int) -> float:
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def _share(text: str, words: Sequence[str]) -> float:
    if fault := words_fault(words):
        raise ValueError(f"`words` {fault}")
    if not words:
        return 1.0
    text = text.casefold()
    # Not \b, since "C++" does not end in a word character.
    found = [re.search(rf"(?<!\w){re.escape(w.strip().casefold())}(?!\w)", text) for w in words]
    return sum(match is not None for match in found) / len(words)
