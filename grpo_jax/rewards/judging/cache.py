"""The verdicts of a run, kept in its folder: what was judged once is not asked again.

So a run that was killed continues with the verdicts that it had, though a judge may answer
otherwise the second time. A failed judgement is not kept: it is tried again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grpo_jax.rewards.judging.verdicts import Verdict


@dataclasses.dataclass(frozen=True)
class Kept:
    """A verdict, and what it cost."""

    verdict: Verdict
    said: str  # the end of what the judge wrote
    prompt_tokens: int = 0
    completion_tokens: int = 0


def key_of(model: str, digest: str, sampling: Any, messages: Any) -> str:
    """The key of a call: SHA-256 of the model, the rubric, the sampling and the messages."""
    whole = json.dumps([model, digest, sampling, messages], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()


class Cache:
    """Verdicts by the key of their call. Every thread may use it."""

    def __init__(self, files: Iterable[Path] = (), append: Callable[[bytes], None] | None = None):
        """Reads the `files` of earlier processes; `append` writes a record. None: nothing is kept.

        The last file is the one that is written to, and its verdicts count before others. A line
        that a killed process left unfinished is skipped.
        """
        self._append, self._lock = append, threading.Lock()
        self._kept: dict[str, Kept] = {}
        self._gap = b""  # ends an unfinished line
        for file in files:
            self._gap = b""
            with file.open("rb") as lines:
                for line in lines:
                    self._read(line)
                    self._gap = self._gap if line.endswith(b"\n") else b"\n"
        self.calls = len(self._kept)  # of earlier processes
        self.tokens = sum(k.prompt_tokens + k.completion_tokens for k in self._kept.values())

    def _read(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            verdict, tokens = [float(x) for x in row["verdict"]], row["tokens"]
            self._kept[row["key"]] = Kept(verdict, str(row["said"]), int(tokens[0]), int(tokens[1]))
        except (ValueError, KeyError, TypeError, IndexError):
            pass

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Kept | None:
        return self._kept.get(key)

    def put(self, key: str, kept: Kept) -> None:
        """Keeps a verdict, in the file too."""
        tokens = [kept.prompt_tokens, kept.completion_tokens]
        row = {"key": key, "verdict": kept.verdict, "said": kept.said, "tokens": tokens}
        with self._lock:
            self._kept[key] = kept
            if self._append is not None:
                self._append(self._gap + json.dumps(row).encode() + b"\n")
                self._gap = b""
