"""Rewards for the tone of a completion, by lexicons and a classifier that work without a network.

They are what ensembles are made of: how friendly a text is, and whether it is clean. A lexicon does
not understand a text, so each of them is easily gamed when it is the only reward.
"""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

from grpo_jax.rewards.completions import replies, text_of

MAX_CHARS = 20_000  # of a completion that is read by a lexicon or classifier
_WORDS = re.compile(r"[\w@$!'-]{1,60}")
_LEET = str.maketrans("@43!10$57", "aaeiiosst")


def sentiment(
    prompts: list[Any],
    completions: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """How positive the words of each completion are, from -1 to 1; 0 is neutral.

    VADER's compound score, by a lexicon of English (Hutto and Gilbert 2014, "VADER"). Of the reply
    after thinking the first 20,000 characters are read.
    """
    analyzer = _vader()
    texts = replies(prompts, completions, rendered_prompts)
    return [float(analyzer.polarity_scores((t or "")[:MAX_CHARS])["compound"]) for t in texts]


def clean_language(
    prompts: list[Any], completions: list[Any], words: list[str] | None = None, **columns: Any
) -> list[float]:
    """1.0 for each completion without a profane word, thinking included, else 0.0.

    `words`: the list in place of better-profanity's, of English. Words are compared whole, without
    case, and with digits and signs that stand for letters (b4d, $ick). A word of the list may
    consist of several.
    """
    listed = _listed(tuple(words)) if words is not None else _default_list()
    return [float(not _has_one(text_of(completion), *listed)) for completion in completions]


def toxicity(
    prompts: list[Any],
    completions: list[Any],
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """Probability that each completion is toxic, in 0..1; give it a negative weight, or a gate.

    By alt-profanity-check, a linear classifier of English words that was trained on 200,000
    comments. Of the reply after thinking the first 20,000 characters are read.
    """
    from profanity_check import predict_prob

    texts = [(t or "")[:MAX_CHARS] for t in replies(prompts, completions, rendered_prompts)]
    return [float(p) for p in predict_prob(texts)] if texts else []


def _refuse_words(words: Any = ("a",)) -> None:
    fine = isinstance(words, (list, tuple)) and all(isinstance(w, str) and w.strip() for w in words)
    if not fine or not words:
        raise ValueError(f"words = {words!r} must be a list of words")


sentiment.needs, sentiment.options = ("vaderSentiment",), ()
clean_language.options, clean_language.refuse = ("words",), _refuse_words
clean_language.needs = lambda words=None: () if words else ("better_profanity",)
toxicity.needs, toxicity.options = ("profanity_check",), ()


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@functools.cache
def _default_list() -> tuple[frozenset[str], int]:
    file = resources.files("better_profanity") / "profanity_wordlist.txt"
    return _listed(tuple(file.read_text(encoding="utf-8").splitlines()))


@functools.lru_cache(maxsize=16)
def _listed(words: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """The entries of a list as texts of `_WORDS`, and the most words in one."""
    entries = [tuple(_WORDS.findall(word.casefold())) for word in words]
    entries = [entry for entry in entries if entry]
    return frozenset(map(" ".join, entries)), max(map(len, entries), default=0)


def _has_one(text: str, listed: frozenset[str], longest: int) -> bool:
    found = _WORDS.findall(text.casefold())
    plain = [w.translate(_LEET) if any(map(str.isalpha, w)) else w for w in found]
    for words in (found, plain):
        for size in range(1, longest + 1):
            for i in range(len(words) - size + 1):
                if " ".join(words[i : i + size]) in listed:
                    return True
    return False
