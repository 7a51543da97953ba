"""Search in a user's own texts: reinforcement learning of retrieval.

    environment.classes = ("grpo_jax.environments.tasks.corpus:Corpus(folder='texts')",)

The folder's .txt and .md files are cut into passages at blank lines and indexed once, at the start,
in memory; all processes of environments share the index. Questions and answers are the problems of
the run, such as JSON lines with `prompt` and `answer`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from grpo_jax.environments.tasks.full_text import Index

_KINDS = (".txt", ".md")


@functools.lru_cache(maxsize=4)
def _index(folder: str, words: int) -> Index:
    return Index(passages(folder, words), stems=True)


def passages(folder: str, words: int) -> list[str]:
    """The passages of a folder's texts, of at most `words` words, each with its file's name.

    Raises ValueError, naming the file, for a folder that is missing, a file that is not UTF-8, and
    if no file holds a text.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"folder = {folder!r} is no folder. Name one with {' or '.join(_KINDS)}.")
    found = []
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in _KINDS and p.is_file())
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 (byte {error.start}: {error.object[error.start]:#04x}). "
                "Convert it, such as with iconv, or move it out of the folder."
            ) from None
        found += [f"[{file.relative_to(root)}] {part}" for part in _parts(text, words)]
    if not found:
        raise ValueError(
            f"folder = {folder!r} holds {len(files)} files with {' or '.join(_KINDS)}, and no text "
            "in them. Search needs at least one passage."
        )
    return found


def _parts(text: str, words: int) -> list[str]:
    """Paragraphs, short ones joined and long ones cut."""
    parts: list[list[str]] = []
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        own = paragraph.split()
        if own and parts and len(parts[-1]) + len(own) <= words:
            parts[-1] += own
            continue
        parts += [own[i : i + words] for i in range(0, len(own), words)]
    return [" ".join(part) for part in parts]


class Corpus:
    """Passages of a folder's texts, found by their words."""

    def __init__(self, folder: str, passages: int = 3, words: int = 100):
        """`passages`: found by a search; `words`: of a passage at most."""
        self._index, self._most = _index(folder, words), passages

    @classmethod
    def __prepare__(cls, folder: str, passages: int = 3, words: int = 100) -> None:
        if passages < 1 or words < 1:
            raise ValueError(f"passages = {passages} and words = {words} must be at least 1.")
        _index(folder, words)

    def reset(self, **row) -> None:
        """Begins an episode."""

    def search(self, query: str) -> str:
        """Searches the documents for passages.

        Args:
            query: What to look for, in a few words.

        Returns:
            The passages that fit best, each after the name of its file.
        """
        found = self._index.search(query, self._most)
        return "\n".join(found) or "No passage has any of these words."
