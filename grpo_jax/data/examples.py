"""Rows with given completions, in the types of data that TRL has: to imitate, or to compare.

A row is a text or chat as a whole (`text`, `messages`, or `conversations` as in ShareGPT), a prompt
with a `completion`, a pair of completions (`chosen` and `rejected`, with a `prompt` or with the
prompt at the start of both), or a completion with a `label`. `masks.py` makes tokens of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.data import chats, problems, sources
from grpo_jax.data.chats import Messages
from grpo_jax.data.problems import Form
from grpo_jax.data.sources import Source
from grpo_jax.messages.values import cut

Ids = np.ndarray  # int32 token ids, [tokens]


class Example(NamedTuple):
    """A completion to imitate, and what comes before it.

    Of a text or chat as a whole, the prompt is its first token, which nothing predicts.
    """

    prompt_ids: Ids
    completion_ids: Ids
    chosen: np.ndarray | None = None  # bool [tokens of the completion]: trained on; None: all


class Pair(NamedTuple):
    """Two completions of a prompt, of which the first is preferred; both end as the model ends."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    margin: float = 0.0  # by which the preferred one is better, in units of a reward


class Unpaired(NamedTuple):
    """A completion, and whether it is desirable."""

    prompt_ids: Ids
    completion_ids: Ids
    label: bool


@dataclasses.dataclass(frozen=True)
class Written:
    """A row as it is written: texts, or chats of messages.

    Prompt and completions are of one kind. `value` is the label or the margin of the row.
    """

    where: str  # for messages: "train.jsonl, line 3"
    prompt: str | Messages | None  # None: the completion is a text or chat as a whole
    completions: tuple[str | Messages, ...]  # of a pair the preferred one first
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the chat template
    value: Any = None
    # The prompt is the common start of two completions, and may end within a token.
    is_implicit: bool = False

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.completions[0], str)


def load(source: Source, form: Form, kind: str) -> Iterator[Written]:
    """The rows of a source, in its order; `kind` is one of KINDS.

    Raises ValueError, naming the option, the file, the row and the column, if the source cannot be
    read or is empty, a row's columns differ from the first row's, or a row is not of the kind.
    """
    for where, row in problems.alike(sources.read(source), source):
        yield from written(row, where, source.options[0], form, kind)


_COLUMNS = {
    "example": {"completion", "messages", "conversations", "text"},
    "pair": {"chosen", "rejected"},
    "unpaired": {"label", "chosen", "rejected"},
}


def is_of(source: Source, form: Form, kind: str) -> bool:
    """Whether the first row of a source has a column that only rows with completions have.

    Or, for "example", a chat as `prompt` that ends with the assistant's message.
    """
    for _, row in sources.read(source):
        names = {form.renames.get(name, name) for name in row}
        if names & _COLUMNS[kind]:
            return True
        prompt = row.get("prompt")
        last = prompt[-1] if isinstance(prompt, list) and len(prompt) > 1 else None
        return kind == "example" and isinstance(last, dict) and last.get("role") == "assistant"
    return False


def written(
    row: dict[str, Any], where: str, option: str, form: Form, kind: str
) -> tuple[Written, ...]:
    """What a row of a source gives; two of kind "unpaired" if it is a pair. Raises as `load`."""
    columns = problems.renamed(row, where, form.renames) if form.renames else dict(row)
    problems.refuse_media(columns, where, option)
    if form.prompt_template:
        columns["prompt"] = problems.filled(columns, where, form)
    return KINDS[kind](_Reader(columns, where, option, form, isinstance(row, sources.Padded)))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """The columns of a row, read and checked by name."""

    columns: dict[str, Any]
    where: str
    option: str
    form: Form
    padded: bool  # null stands for a missing key

    def has(self, *names: str) -> bool:
        return all(self.columns.get(name) is not None for name in names)

    def content(self, name: str, *, is_prompt: bool = False) -> str | Messages:
        """A column's text or messages; ValueError for what is neither.

        `is_prompt`: blank ones are refused.
        """
        value = self.columns[name]
        if isinstance(value, str):
            value = self._in_text(name, value)
        if isinstance(value, list):
            value = chats.without_nulls(value) if self.padded else value
            value = chats.with_roles(value)
            fault = chats.fault(value, is_prompt=is_prompt)
        elif isinstance(value, str):
            fault = "is blank" if is_prompt and not value.strip() else None
        else:
            fault = f"is a {type(value).__name__}"
        if fault:
            raise self.refusal(
                f"`{name}` {fault}: {cut(json.dumps(value, default=str))}. It must be a text, or "
                'a list of messages such as {"role": "user", "content": "..."}.'
            )
        return value if isinstance(value, str) else chats.plain(value)

    def _in_text(self, name: str, value: str) -> Any:
        try:
            return chats.in_text(value)
        except ValueError as error:
            raise self.refusal(
                f"`{name}` {error}: {cut(value)}. Write the messages as JSON."
            ) from error

    def prompt(self) -> str | Messages:
        """The column `prompt`, as the options of `data` have it."""
        prompt = self.content("prompt", is_prompt=True)
        return problems.as_chat(prompt, self.where, self.form)

    def completion(self, name: str, prompt: str | Messages) -> str | Messages:
        """A column with what comes after a prompt, of the same kind as that.

        A text after a chat is the assistant's message, and one message of the assistant after a
        text is its content.
        """
        value = self.content(name)
        if isinstance(prompt, str) == isinstance(value, str):
            return value
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}]
        if len(value) == 1 and value[0]["role"] == "assistant" and "tool_calls" not in value[0]:
            return value[0].get("content", "")
        raise self.refusal(
            f"`prompt` is a text and `{name}` a chat of {len(value)} messages. Write both as "
            "chats, or both as texts, or set data.chat = True."
        )

    def whole(self, name: str) -> str | Messages:
        """A column with a text or chat as a whole."""
        value = self.content(name)
        if isinstance(value, str) and not value.strip():
            raise self.refusal(f"`{name}` is blank.")
        if isinstance(value, str) and self.form.chat:
            raise self.refusal(
                f"data.chat = True makes a prompt a chat, and `{name}` is a text without one. Set "
                "data.chat = False."
            )
        return problems.as_chat(value, self.where, self.form)

    def given(self, content: str | Messages) -> dict[str, Any]:
        """Arguments of the chat template, if the content is a chat."""
        if isinstance(content, str):
            return {}
        try:
            return self.form.arguments | chats.given(self.columns, self.padded)
        except ValueError as error:
            raise self.refusal(f"{error}.") from error

    def refusal(self, text: str) -> ValueError:
        return ValueError(f"{self.option}: {self.where}: {text}")

    def lacks(self, wanted: str) -> ValueError:
        names = ", ".join(n for n in self.columns if self.columns[n] is not None) or "no columns"
        return ValueError(
            f"{self.option}: {self.where} has {wanted}; it has {names}. data.columns can rename "
            "one, such as completion=solution."
        )


def _example(row: _Reader) -> tuple[Written, ...]:
    if row.has("completion"):
        if not row.has("prompt"):
            raise row.lacks("a `completion` and no `prompt` before it")
        prompt = row.prompt()
        completion = row.completion("completion", prompt)
        return (Written(row.where, prompt, (completion,), row.given(prompt)),)
    for name in ("messages", "conversations", "text"):
        if row.has(name):
            whole = row.whole(name)
            return (Written(row.where, None, (whole,), row.given(whole)),)
    if row.has("prompt"):
        chat = row.prompt()
        if not isinstance(chat, str) and len(chat) > 1 and chat[-1]["role"] == "assistant":
            return (Written(row.where, chat[:-1], (chat[-1:],), row.given(chat)),)
    raise row.lacks(
        "no text or messages as column `completion` to train on, no `text`, `messages` or "
        "`conversations`, and no message of an assistant at the end of `prompt`"
    )


def _pair(row: _Reader) -> tuple[Written, ...]:
    if not row.has("chosen", "rejected"):
        missing = [n for n in ("chosen", "rejected") if not row.has(n)]
        raise row.lacks(f"no `{'` and no `'.join(missing)}`, and a pair needs both")
    margin = row.columns.get("margin") or 0.0
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if not is_number or not math.isfinite(margin):
        raise row.refusal(
            f"`margin` is {cut(repr(margin))}. It must be a finite number; rename the column in "
            "data.columns if it holds something else."
        )
    prompt, both, is_implicit = _parts(row)
    given = row.given(both[0])
    return (Written(row.where, prompt, both, given, float(margin), is_implicit),)


def _parts(row: _Reader) -> tuple[str | Messages, tuple[Any, Any], bool]:
    """Prompt, both completions, and whether the prompt is their common start.

    It is without a column `prompt`, and where both completions are chats that hold the prompt
    already, as in UltraFeedback.
    """
    chosen, rejected = row.content("chosen"), row.content("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row.refusal(
            "one of `chosen` and `rejected` is a text and the other a chat. Write both alike."
        )
    is_whole = not isinstance(chosen, str) and len(chosen) > 1 and chosen[0]["role"] != "assistant"
    if row.has("prompt") and not is_whole:
        prompt = row.prompt()
        return prompt, tuple(row.completion(n, prompt) for n in ("chosen", "rejected")), False
    if isinstance(chosen, str) and row.form.chat:
        raise row.refusal(
            "data.chat = True makes a prompt a chat, and there is no `prompt`, only the common "
            "start of `chosen` and `rejected`. Set data.chat = False, or give the prompt."
        )
    at = _common_start(chosen, rejected)
    prompt, both = chosen[:at], (chosen[at:], rejected[at:])
    if not at:
        raise row.refusal(
            "`chosen` and `rejected` have no common start, and there is no `prompt`. Give the "
            "prompt in a column of its own, or as the start of both."
        )
    if not isinstance(prompt, str):
        prompt = problems.as_chat(prompt, row.where, row.form)
    return prompt, both, True


def _common_start(chosen: str | Messages, rejected: str | Messages) -> int:
    """Length of the common start: in messages, or in characters without a space at its end.

    As `extract_prompt` of TRL 1.16; where one holds the other, all but the last of the shorter.
    """
    shorter = min(len(chosen), len(rejected))
    at = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if at is None:
        return max(shorter - 1, 0)
    return at - 1 if at and chosen[at - 1] == " " else at


def labelled(pair: Written) -> tuple[Written, Written]:
    """A pair as a desirable completion and an undesirable one."""
    return tuple(
        dataclasses.replace(pair, completions=(completion,), value=label)
        for completion, label in zip(pair.completions, (True, False))
    )


def _unpaired(row: _Reader) -> tuple[Written, ...]:
    if row.has("chosen", "rejected") and not row.has("label"):
        return labelled(*_pair(row))
    missing = [n for n in ("prompt", "completion", "label") if not row.has(n)]
    if missing:
        raise row.lacks(f"no `{'` and no `'.join(missing)}`, and no `chosen` with a `rejected`")
    label = row.columns["label"]
    if label not in (True, False):
        raise row.refusal(
            f"`label` is {cut(repr(label))}. It must be true for a desirable completion, or false."
        )
    prompt = row.prompt()
    completion = row.completion("completion", prompt)
    return (Written(row.where, prompt, (completion,), row.given(prompt), bool(label)),)


KINDS: dict[str, Callable[[_Reader], tuple[Written, ...]]] = {
    "example": _example,
    "pair": _pair,
    "unpaired": _unpaired,
}
