"""Search in texts by their words, ranked by BM25: SQLite's FTS5, which Python brings along."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
_MAX_WORDS = 32  # of a query


class Index:
    """Some texts, in memory. Processes that are forked from this one share it."""

    def __init__(self, texts: Sequence[str], *, stems: bool = False):
        """`stems`: English words match in all their forms, as dog and dogs."""
        kind = "porter unicode61" if stems else "unicode61"
        self._texts = list(texts)
        self._database = sqlite3.connect(":memory:")
        try:
            self._database.execute(
                f"CREATE VIRTUAL TABLE found USING fts5(text, content='', tokenize='{kind}')"
            )
        except sqlite3.OperationalError as error:
            raise ValueError(
                f"This Python's SQLite {sqlite3.sqlite_version} cannot search texts ({error}). "
                "Take a Python whose SQLite has FTS5, as those of python.org and conda have."
            ) from error
        self._database.executemany(
            "INSERT INTO found(rowid, text) VALUES (?, ?)", enumerate(self._texts)
        )
        self._database.commit()

    def search(self, query: str, most: int = 1) -> list[str]:
        """The texts that fit best, the best first; none if no word of the query is in any."""
        words = _WORD.findall(str(query))[:_MAX_WORDS]
        if not words:
            return []
        # In quotes no word is an operator of FTS5's language, which a policy may write by chance.
        asked = " OR ".join(f'"{word}"' for word in words)
        rows = self._database.execute(
            "SELECT rowid FROM found WHERE found MATCH ? ORDER BY rank, rowid LIMIT ?",
            (asked, most),
        )
        return [self._texts[row] for (row,) in rows]
