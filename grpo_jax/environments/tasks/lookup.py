"""Search in a made corpus, for the tasks lookup and lookup_twice; and in one that is of no use."""

from __future__ import annotations

import functools

from grpo_jax.data import corpora
from grpo_jax.environments.tasks.full_text import Index


@functools.lru_cache(maxsize=16)
def _index(corpus: str, is_false: bool) -> Index:
    return Index(corpora.make(corpus, is_false=is_false).documents)


class Search:
    """Searches the corpus of the row's column `corpus`."""

    _is_false = False

    def reset(self, corpus: str, **row) -> None:
        """Begins an episode.

        Args:
            corpus: The corpus, as "SEED-NUMBER".
        """
        self._index = _index(corpus, self._is_false)

    def search(self, query: str) -> str:
        """Searches the documents.

        Args:
            query: Words to look for.

        Returns:
            The document that fits best.
        """
        found = self._index.search(query)
        return found[0] if found else "-"


class FalseSearch(Search):
    """For a control: documents tell nothing that is true."""

    _is_false = True
