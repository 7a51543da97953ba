"""What an environment says, cut to its limit in tokens: the head, a mark, and the tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo_jax.environments.spelling import Spelling

MARKS = ("\n[... text left out ...]\n", "...", "")  # the first that fits, and can be written
_CHARS = 64  # of a token at most; of a longer text the middle is not even read


def fitted(
    texts: Sequence[str], limit: int, spelling: Spelling, encode: Callable[[str], list[int]]
) -> list[str]:
    """The texts of one group, `limit` tokens together: short ones whole, long ones cut.

    A longer text keeps its head and its tail, with a mark between them. It is cut between tokens
    of `encode`, and never in a character. The limit is divided evenly, and what short texts leave
    is for the long ones.
    """
    reach = _CHARS * limit
    found = [t if len(t) <= 2 * reach else t[:reach] + t[-reach:] for t in texts]
    sizes = [len(encode(text)) for text in found]
    if sum(sizes) <= limit:
        return found
    left = limit
    for position, i in enumerate(sorted(range(len(found)), key=sizes.__getitem__)):
        share = left // (len(found) - position)
        if sizes[i] > share:
            found[i] = _cut(found[i], share, spelling, encode)
        left -= len(encode(found[i]))
    return found


def _cut(text: str, limit: int, spelling: Spelling, encode: Callable[[str], list[int]]) -> str:
    """A text of more than `limit` tokens without its middle."""
    for mark in MARKS:
        size = len(encode(mark))
        if 4 * size <= limit and spelling.text(spelling.plain(mark)) == mark:
            break
    spans, room = spelling.spans(text), limit - size
    while room > 0:
        tail = room // 2
        cut = text[: spans[room - tail - 1][1]] + mark + (text[spans[-tail][0] :] if tail else "")
        over = len(encode(cut)) - limit
        if over <= 0:
            return cut
        room -= over
    return ""
