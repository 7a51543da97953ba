"""Rows as tokens, with what was done to make them and what is odd about some; it is told once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from grpo_jax.data import chats
from grpo_jax.data.chats import Messages
from grpo_jax.data.examples import Written


@dataclasses.dataclass(frozen=True)
class Odd:
    """Counts of odd rows, with the place of the first of each kind."""

    num_empty: int = 0  # a completion has no text, and calls no tool
    num_equal: int = 0  # both completions of a pair are equal
    first_empty: str = ""
    first_equal: str = ""
    roles: frozenset[str] = frozenset()  # of messages, that are not the usual ones

    @staticmethod
    def of(rows: Sequence[Written]) -> Odd:
        empty = [row.where for row in rows if any(map(_is_empty, row.completions))]
        equal = [row.where for row in rows if row.completions[1:] == row.completions[:1]]
        chat = [
            content for row in rows if row.is_chat for content in (row.prompt, *row.completions)
        ]
        roles = frozenset().union(*map(chats.unknown_roles, filter(None, chat)))
        return Odd(len(empty), len(equal), *(next(iter(x), "") for x in (empty, equal)), roles)

    def __add__(self, other: Odd) -> Odd:
        return Odd(
            self.num_empty + other.num_empty,
            self.num_equal + other.num_equal,
            self.first_empty or other.first_empty,
            self.first_equal or other.first_equal,
            self.roles | other.roles,
        )

    def told(self, total: int, noun: str) -> list[str]:
        """Warnings, of `total` rows that are called `noun`."""
        found = [
            f"Messages of {noun} have the role {role!r}, which few chat templates write as it is "
            "meant. samples.jsonl shows what the model reads."
            for role in sorted(self.roles)
        ]
        if self.num_empty:
            found.append(
                f"{self.num_empty:,} of {total:,} {noun} have a completion without a text, the "
                f"first {self.first_empty}: the model learns to end at once. Leave them out if "
                "that is not meant."
            )
        if self.num_equal:
            found.append(
                f"{self.num_equal:,} of {total:,} {noun} have the same text as chosen and "
                f"rejected, the first {self.first_equal}: nothing is learned from them."
            )
        return found


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Rows as tokens, in their order, and what was done to make them.

    `num_unmarked`: rows of a template whose {% generation %} leaves out the token that ends a turn.
    """

    examples: list[Any]  # of one kind of `examples.KINDS`
    num_rows: int = 0  # with those that were dropped
    num_dropped: int = 0
    num_truncated: int = 0
    num_ended: int = 0  # chats whose template writes no stop token at the end; it was added
    num_unmarked: int = 0
    odd: Odd = dataclasses.field(default_factory=Odd)
    places: tuple[str, ...] = ()  # of the examples; empty in a sum
    reads: frozenset[str] | None = None  # names that the chat template reads; None without one

    def __add__(self, other: Encoded) -> Encoded:
        read = [reads for reads in (self.reads, other.reads) if reads is not None]
        counts = [f.name for f in dataclasses.fields(self) if f.name.startswith("num_")]
        return Encoded(
            self.examples + other.examples,
            **{name: getattr(self, name) + getattr(other, name) for name in counts},
            odd=self.odd + other.odd,
            reads=frozenset.union(*read) if read else None,
        )


def _is_empty(completion: str | Messages) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any((m.get("content") or "").strip() or m.get("tool_calls") for m in completion)
