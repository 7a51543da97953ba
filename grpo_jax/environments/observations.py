"""What an environment says, cut to its limit in tokens: the head, a mark, and the tail."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_jax.environments.spelling import Spelling

# What stands for the middle: the first that can be written, and has at most this share of a limit.
MARKS = {"\n[... text left out ...]\n": 1 / 4, "...": 1 / 2, "": 0}
_CHARS = 64  # of a token at most; of a longer text the middle is not even read


class Observations:
    """The limit of what an environment says between two turns, in tokens of plain text."""

    def __init__(self, spelling: Spelling, limit: int):
        self._spelling, self._limit = spelling, limit
        self._marks = [
            (mark, len(ids)) for mark in MARKS if spelling.text(ids := spelling.plain(mark)) == mark
        ]

    def fitted(self, texts: Sequence[str]) -> list[str]:
        """The texts of one group, which have the limit together: short ones whole, long ones cut.

        A longer text keeps its head and its tail, with a mark between them. It is cut between its
        tokens, and never in a character. The limit is divided evenly, and what short texts leave is
        for the long ones.
        """
        most = sum(len(text.encode("utf-8", "replace")) + 1 for text in texts)
        if most <= self._limit:  # a token has a byte at least, besides one before a text
            return list(texts)
        reach = _CHARS * self._limit
        found = [t if len(t) <= 2 * reach else t[:reach] + t[-reach:] for t in texts]
        spans = [self._spelling.spans(text) for text in found]
        left = self._limit
        order = sorted(range(len(found)), key=lambda i: len(spans[i]))
        for position, i in enumerate(order):
            share = left // (len(found) - position)
            if len(spans[i]) <= share and found[i] == texts[i]:
                left -= len(spans[i])
            else:
                found[i], size = self._cut(found[i], spans[i], share)
                left -= size
        return found

    def _cut(self, text: str, spans: list[tuple[int, int]], limit: int) -> tuple[str, int]:
        """A text without its middle, in at most `limit` tokens, and their number."""
        mark, size = next((m, n) for m, n in self._marks if n <= MARKS[m] * limit)
        room = min(limit - size, len(spans) - 1)
        while room > 0:
            head, tail = room - room // 2, len(spans) - room // 2
            cut = text[: spans[head][0]] + mark + text[spans[tail - 1][1] :]  # whole characters
            num = len(self._spelling.plain(cut))
            if num <= limit:
                return cut, num
            room -= num - limit
        return "", 0
