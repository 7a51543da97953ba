"""Reward for a completion that stays in one language, thinking included.

DeepSeek-R1 rewards the share of words in the wanted language, since a model that is trained on
answers alone mixes languages when it thinks (DeepSeek-AI 2025, arXiv:2501.12948, section 2.3.2).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from grpo_jax.rewards import extras
from grpo_jax.rewards.completions import text_of

MAX_CHARS = 20_000  # of a completion that is read sentence by sentence
_SCRIPTS = {
    "LATIN": "af ca cs cy da de en es et eu fi fr ga gl hr hu id is it la lt lv ms mt nb nl nn no "
    "pl pt ro sk sl sq sv sw tl tr vi",
    "CYRILLIC": "be bg kk ky mk mn ru sr uk",
    "CJK": "zh ja",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "ARABIC": "ar fa ps ug ur",
    "HEBREW": "he yi",
    "GREEK": "el",
    "DEVANAGARI": "hi mr ne sa",
    "BENGALI": "as bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
    "ETHIOPIC": "am ti",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "SINHALA": "si",
}
_OF_LANGUAGE: dict[str, set[str]] = {}
for _script, _codes in _SCRIPTS.items():
    for _code in _codes.split():
        _OF_LANGUAGE.setdefault(_code, set()).add(_script)
_NO_PROSE = re.compile(r"```.*?```|\$[^$\n]{1,400}\$|\\[a-zA-Z]+|</?\w{1,30}>", re.DOTALL)
_SENTENCE = re.compile(r"[^.!?\n。！？]+")
_MIN_LETTERS = 12  # of a sentence whose language can be told


def language_consistency(
    prompts: list[Any],
    completions: list[Any],
    language: str | list[str] = "en",
    by: str = "script",
    among: list[str] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Share of each completion's letters that are in the wanted language, in 0..1.

    `language`: a code such as "en" or "zh", bound by the config or a column. `by` "script": letters
    of the scripts that the language is written in, so that Chinese between English is seen, and
    French is not. "sentence": letters of the sentences that py3langid takes for the language, of
    the first 20,000 characters; `among` limits the languages that it chooses from, which short
    sentences need. Code between ``` and formulas between $ are not read. None for a completion
    without letters, or without a sentence long enough to tell.
    """
    rows = [language] * len(completions) if isinstance(language, str) else language
    texts = [_NO_PROSE.sub(" ", text_of(completion)) for completion in completions]
    if by == "script":
        return [_by_script(text, row) for text, row in zip(texts, rows, strict=True)]
    told = _identifier(among)
    return [_by_sentence(text, row, told) for text, row in zip(texts, rows, strict=True)]


def language_fault(value: Any) -> str | None:
    """The fault of a value that is no code of a language; None for a valid one."""
    if value is None:
        return "is null"
    if not isinstance(value, str) or value not in _OF_LANGUAGE:
        return f"is no code of a language: {', '.join(sorted(_OF_LANGUAGE))}"
    return None


def _refuse(language: Any = "en", by: Any = "script", among: Any = None) -> None:
    if fault := language_fault(language):
        raise ValueError(f"language = {language!r} {fault}")
    if by not in ("script", "sentence"):
        raise ValueError(f'by = {by!r} must be "script" or "sentence"')
    if among is not None and not (isinstance(among, (list, tuple)) and language in among):
        raise ValueError(f"among = {among!r} must be a list of codes with {language!r}")
    if by == "sentence" and (lacks := extras.lacking("py3langid")):
        raise ValueError(f'by = "sentence" {lacks}')


language_consistency.column_faults = {"language": language_fault}
language_consistency.options = ("by", "among")
language_consistency.refuse = _refuse


@functools.lru_cache(maxsize=8192)
def _script(character: str) -> str:
    """The script of a letter, as the first word of its name in Unicode; "" for no letter."""
    if not character.isalpha():
        return ""
    script = unicodedata.name(character, "").partition(" ")[0]
    return "LATIN" if script in ("FULLWIDTH", "MODIFIER") else script


def _by_script(text: str, language: str) -> float | None:
    letters: Counter[str] = Counter()
    for character, number in Counter(text).items():
        letters[_script(character)] += number
    del letters[""]
    total = letters.total()
    wanted = sum(letters[script] for script in _OF_LANGUAGE[language])
    return wanted / total if total else None


def _by_sentence(text: str, language: str, told: Callable) -> float | None:
    total = wanted = 0
    for sentence in _SENTENCE.findall(text[:MAX_CHARS]):
        letters = sum(map(str.isalpha, sentence))
        if letters >= _MIN_LETTERS or any(_script(c) == "CJK" for c in sentence):
            total += letters
            wanted += letters * (told(_encodable(sentence))[0] == language)
    return wanted / total if total else None


def _encodable(text: str) -> str:
    return text.strip().encode("utf-8", "replace").decode()


def _identifier(among: list[str] | None) -> Callable[[str], tuple[str, float]]:
    """py3langid's classifier, among these languages: from a text to its language, and a weight."""
    import py3langid

    py3langid.set_languages(among)
    return py3langid.classify
