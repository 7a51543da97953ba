"""Texts as ids and back, with control tokens told from texts that merely spell them.

A control token is an added token of the tokenizer: `<|im_end|>`, `<tool_call>`. An environment may
say such a text, and a policy may write it in ordinary tokens; neither is the control token.
transformers' `split_special_tokens` helps with the first for tokens that are marked as special,
and not for others, as `<tool_call>` of Qwen2.5 (huggingface/transformers#29279).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# Characters that no text holds: noncharacters of Unicode.
_GUARDS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


class Spelling:
    """The two ways in which a tokenizer reads a text: with control tokens, and without any."""

    def __init__(self, tokenizer: Any):
        """`tokenizer`: of transformers, with a `tokenizer.json`; another raises ValueError."""
        from tokenizers import AddedToken

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"The tokenizer is a {type(tokenizer).__name__}, and conversations with an "
                "environment need a fast one, with a file tokenizer.json. Save it once with "
                "transformers' AutoTokenizer, or use another model."
            )
        self._tokenizer = tokenizer
        self._full = backend
        self._added = dict(backend.get_added_tokens_decoder())
        self.control = {i: t.content for i, t in self._added.items() if t.content.strip()}
        self._plain = _without_control(backend)
        # Text stands in the middle of a conversation, where some tokenizers write no first space.
        self._anchor = "\ufdd0\ufdd1"
        self._plain.add_special_tokens([AddedToken(self._anchor, normalized=False)])
        # Runs of spaces that are added tokens are no control tokens; their ids must stay.
        self._ids = {
            self._plain.token_to_id(t.content): i
            for i, t in self._added.items()
            if i not in self.control
        }
        texts = sorted((t for t in self.control.values() if len(t) > 1), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._whole = frozenset(  # texts that are one token of the vocabulary even so
            text for text in texts if self.control.keys() & set(self._encode(text))
        )

    def plain(self, text: str, *, is_start: bool = False) -> list[int]:
        """The ids of a text without any control token; `is_start`: nothing stands before it."""
        ids: list[int] = []
        for number, part in enumerate(_halved(_with_whole_characters(text), self._whole)):
            ids += self._encode(part, is_start and number == 0)
        return ids

    def full(self, text: str) -> list[int]:
        """The ids of a text, control tokens read as such, and none added."""
        text = _with_whole_characters(text)
        return self._full.encode(text, add_special_tokens=False).ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Of each token of `plain(text)` its characters: the first, and one past the last."""
        text = self._anchor + _with_whole_characters(text).replace(self._anchor, "")
        offsets = self._plain.encode(text, add_special_tokens=False).offsets[1:]
        skipped = len(self._anchor)
        return [(max(first - skipped, 0), past - skipped) for first, past in offsets]

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt that is plain text, as `data.prompts.encode` makes them."""
        ids = list(self._tokenizer(text, verbose=False)["input_ids"])
        begin = self._tokenizer.bos_token
        return ids[1:] if begin and text.startswith(begin) and ids[:1] == ids[1:2] else ids

    def pieces(self, text: str) -> list[tuple[int | str, bool]]:
        """A text cut at its control tokens: ids of these (True), and texts between (False)."""
        found: list[tuple[int | str, bool]] = []
        text = _with_whole_characters(text)
        encoding = self._full.encode(text, add_special_tokens=False)
        end = 0
        for token, (first, past) in zip(encoding.ids, encoding.offsets):
            if token not in self.control:
                continue
            if first > end:
                found.append((text[end:first], False))
            found.append((token, True))
            end = past
        if end < len(text):
            found.append((text[end:], False))
        return found

    def strips(self, token: int) -> tuple[bool, bool]:
        """Whether a control token swallows white space before it, and after it."""
        return self._added[token].lstrip, self._added[token].rstrip

    def text(self, ids: Sequence[int]) -> str:
        """What ids say, control tokens by their texts."""
        return "".join(text for text, _ in self._runs(ids))

    def guarded(self, ids: Sequence[int]) -> tuple[str, str]:
        """What ids say, with a mark in texts that spell a control token; and the mark.

        Whoever looks for the text of a control token then finds the control tokens alone. The mark
        is one character, which the text holds nowhere else.
        """
        runs = self._runs(ids)
        whole = "".join(text for text, _ in runs)
        mark = next(guard for guard in _GUARDS if guard not in whole)
        marked = []
        for text, is_control in runs:
            while not is_control and self._spelled.search(text):
                text = self._spelled.sub(lambda found: found[0][0] + mark + found[0][1:], text)
            marked.append(text)
        return "".join(marked), mark

    def _runs(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        runs: list[tuple[str, bool]] = []
        start = 0
        for end, token in enumerate([*ids, None]):
            if token is not None and token not in self.control:
                continue
            if end > start:
                runs.append((self._decode(ids[start:end]), False))
            if token is not None:
                runs.append((self.control[token], True))
            start = end + 1
        return runs

    def _encode(self, text: str, is_start: bool = False) -> list[int]:
        if not text:
            return []
        text = text.replace(self._anchor, "")
        anchored = text if is_start else self._anchor + text
        ids = self._plain.encode(anchored, add_special_tokens=False).ids
        ids = ids if is_start else ids[1:]
        return [self._ids.get(i, i) for i in ids] if self._ids else ids

    def _decode(self, ids: Sequence[int]) -> str:
        # After a control token, as decoders drop a space at the very start.
        if not self.control:
            return self._full.decode(list(ids), skip_special_tokens=False)
        first, spelled = next(iter(self.control.items()))
        text = self._full.decode([first, *ids], skip_special_tokens=False)
        return text.removeprefix(spelled)


def _without_control(backend: Any) -> Any:
    """A copy of a tokenizer that knows no added tokens but white space, and only splits texts."""
    from tokenizers import Tokenizer

    written = json.loads(backend.to_str())
    written |= dict.fromkeys(("truncation", "padding", "post_processor"))
    written["added_tokens"] = [t for t in written["added_tokens"] if not t["content"].strip()]
    return Tokenizer.from_str(json.dumps(written))


def _with_whole_characters(text: str) -> str:
    """A text without halves of characters, which have no tokens; JSON of a model may hold some."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _halved(text: str, wholes: frozenset[str]) -> list[str]:
    """A text cut after the first character of each of some words in it."""
    parts, rest = [], text
    while True:
        found = [(rest.find(word), word) for word in wholes if word in rest]
        if not found:
            return [*parts, rest]
        at = min(found)[0] + 1
        parts.append(rest[:at])
        rest = rest[at:]
