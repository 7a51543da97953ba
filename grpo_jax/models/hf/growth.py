"""Bounds how much longer a tokenizer's rules can make a text.

The rules come with a model and run in Rust, which ends the process when memory runs out: 40 rules
that each double a letter make a terabyte. So the growth is bounded from the rules' text before they
run; that takes no longer than reading the file.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

# Times, in bytes of UTF-8. The tokenizers of the supported families stay below 100.
_MOST = 1000

_STAGES = ("normalizer", "pre_tokenizer", "post_processor")  # of encoding

# Keys of lists of rules that run one after the other.
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")

# The most bytes that a rule makes of one byte, by type. Other types lengthen nothing or are handled
# below.
_FACTORS = {
    "ByteLevel": 4,  # two bytes for one, and a space before each word
    "Metaspace": 8,  # the same with three bytes
    "BertNormalizer": 3,  # spaces around each Chinese character
    "Lowercase": 1.5,
    "NFD": 3,  # Unicode Standard Annex 15, section 11.1
    "NFC": 3,
    "NFKD": 11,
    "NFKC": 11,
}


def refuse(folder: Path) -> None:
    """Raises ValueError if a tokenizer.json of the folder may lengthen texts beyond the limit."""
    for file in folder.glob("*tokenizer*.json"):
        if file.name == "tokenizer_config.json":
            continue
        try:
            rules = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_read_once)
            encoding = math.prod(_factor(rules.get(stage)) for stage in _STAGES)
            decoding = _factor(rules.get("decoder"))
        except (OSError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{file}: the tokenizer cannot be loaded ({error}).") from error
        for what, factor in ((", ".join(_STAGES), encoding), ("decoder", decoding)):
            if factor > _MOST:
                raise ValueError(
                    f"{file}: its rules ({what}) may make a text {factor:.3g} times as long, and "
                    f"at most {_MOST} times is taken. Get the tokenizer's files again."
                )


def _read_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys: readers disagree on which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _factor(rule: Any) -> float:
    """An upper bound of the factor by which a rule lengthens a text of at least one byte.

    It looks at the keys of the rule, since the file may leave out the type.
    """
    if not isinstance(rule, dict):
        return 1.0
    factor = _FACTORS.get(rule.get("type"), 1.0) if isinstance(rule.get("type"), str) else 1.0
    for name in _LISTS:
        if isinstance(rule.get(name), list):
            factor *= math.prod(map(_factor, rule[name]))
    if "content" in rule:
        factor *= _of_replacing(rule.get("pattern"), _size(rule["content"]))
    if "prepend" in rule:
        factor *= 1 + _size(rule["prepend"])
    if "precompiled_charsmap" in rule:
        factor *= _of_table(rule["precompiled_charsmap"])
    return factor * _of_template(rule.get("single"), rule.get("special_tokens"))


def _size(text: Any) -> int:
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0


def _of_replacing(pattern: Any, num_bytes: int) -> float:
    """The factor of replacing each match by a text; a regular expression may match nothing."""
    whole = _size(pattern.get("String")) if isinstance(pattern, dict) else _size(pattern)
    return max(1.0, num_bytes / whole) if whole else 1.0 + num_bytes


def _of_table(text: Any) -> float:
    """The factor of SentencePiece's table: the size of a trie, the trie, and the replacements."""
    try:
        table = base64.b64decode(text)
    except (TypeError, ValueError):
        return 1.0  # the tokenizer cannot be loaded
    start = 4 + int.from_bytes(table[:4], "little")
    return max(1.0, *map(len, table[start:].split(b"\0")))


def _of_template(pieces: Any, tokens: Any) -> float:
    """The factor of a template of text and special tokens, in tokens."""
    if not isinstance(pieces, list):
        return 1.0
    ids = {
        name: len(token["ids"])
        for name, token in (tokens.items() if isinstance(tokens, dict) else ())
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    total = 0
    for piece in pieces:
        special = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = special.get("id") if isinstance(special, dict) else None
        total += ids.get(name, 1) if isinstance(name, str) else 1
    return max(1.0, float(total))
