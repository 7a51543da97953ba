"""Rows with given completions as tokens, and which of their tokens are trained on.

Prompt and completion are encoded as one text, so that their tokens are those of the whole. Where
the prompt's own tokens are no prefix of it, the model would be trained after other tokens than it
reads later, and the row is refused. TRL 1.16's SFTTrainer warns there; elsewhere its masks are the
same: `completion_only_loss`, `assistant_only_loss`, and all tokens of a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from grpo_jax.data import prompts, templates
from grpo_jax.data.chats import Messages
from grpo_jax.data.encoded import Encoded, Odd
from grpo_jax.data.examples import Example, Ids, Pair, Unpaired, Written
from grpo_jax.data.templates import CLOSED, OPEN, REPLY, Renderer, Span


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most tokens of a prompt and of a completion, and what is done with longer ones.

    `overlong`, of prompts, and `too_long`, of completions: "refuse", "drop" or "truncate". `names`:
    the options of `prompt`, `completion` and `too_long`, for messages.
    """

    prompt: int
    completion: int
    overlong: str = "refuse"
    too_long: str = "refuse"
    names: tuple[str, str, str] = ("data.max_prompt_tokens", "sft.max_tokens", "sft.too_long")


@dataclasses.dataclass
class _Row:
    """A row on its way: its texts, then its tokens."""

    written: Written
    prompt: str | None = None
    wholes: list[str] = dataclasses.field(default_factory=list)  # prompt and completion
    spans: list[list[Span] | None] = dataclasses.field(default_factory=list)  # of the assistant
    prompt_ids: list[int] = dataclasses.field(default_factory=list)
    whole_ids: list[Ids] = dataclasses.field(default_factory=list)
    chosen: list[np.ndarray | None] = dataclasses.field(default_factory=list)  # of the whole


def encode(
    rows: Sequence[Written],
    kind: str,
    tokenizer: Any,
    stop_ids: Sequence[int],
    limits: Limits,
    *,
    loss_on: str = "completion",
    now: datetime | None = None,
    on_text: Callable[[int, int], None] = lambda done, total: None,
    renderer: Renderer | None = None,
) -> Encoded:
    """The rows as examples of their kind.

    A text ends with the tokenizer's end of text; a chat as its template ends it, and with a stop
    token of the model (`stop_ids`) if the template writes none. `loss_on`: "completion",
    "assistant" or "all", as `sft.loss_on`. `now` and `on_text` as of `prompts.encode`. `renderer`:
    one that further calls use too; None: one of this call.

    Raises ValueError, naming the row, if a chat has no template or is refused by it, if the tokens
    of a prompt are no prefix of those of the whole, if "assistant" is asked for and the row has
    none, or the template changes earlier turns, and if a row is too long and that is refused.
    """
    made = [_Row(row) for row in rows]
    with contextlib.nullcontext(renderer) if renderer else Renderer() as used:
        render = functools.partial(_render, used, tokenizer, now, on_text)
        reads = _write(made, loss_on, render)
    _tokenize([row for row in made if row.written.is_chat], tokenizer, special=False)
    _tokenize([row for row in made if not row.written.is_chat], tokenizer, special=True)
    end = tokenizer.eos_token_id
    end = stop_ids[0] if end is None else end
    num_ended = num_unmarked = 0
    for row in made:
        ended = _end(row, end, {end, *stop_ids})
        num_ended += ended and row.written.is_chat
        num_unmarked += _is_unmarked(row, {end, *stop_ids})
    return dataclasses.replace(
        _cut([_parts(row, tokenizer, loss_on) for row in made], rows, kind, limits),
        num_rows=len(rows),
        num_ended=num_ended,
        num_unmarked=num_unmarked,
        odd=Odd.of(rows),
        reads=reads,
    )


# --- Texts ----------------------------------------------------------------------------------------


Render = Callable[[Sequence[tuple[_Row, Messages, str]], bool], templates.Rendered]


def _write(rows: Sequence[_Row], loss_on: str, render: Render) -> frozenset[str] | None:
    """Sets the texts of rows, and the spans of the assistant; returns what the template reads."""
    chats = [row for row in rows if row.written.is_chat]
    for row in rows:
        if not row.written.is_chat:
            row.prompt = row.written.prompt
            row.wholes = [(row.prompt or "") + text for text in row.written.completions]
            row.spans = [None] * len(row.wholes)
    if loss_on == "assistant" and len(chats) < len(rows):
        where = next(row.written.where for row in rows if not row.written.is_chat)
        raise ValueError(
            f'sft.loss_on = "assistant", but {where} is a text, which has no turns of an '
            'assistant. Set it to "completion" or "all", or write the rows as chats.'
        )
    if not chats:
        return None
    asked = [
        (row, messages, end)
        for row in chats
        for messages, end in (
            *((_joined(row.written.prompt, c), CLOSED) for c in row.written.completions),
            *([] if row.written.prompt is None else [(row.written.prompt, REPLY)]),
        )
    ]
    found = render(asked, loss_on == "assistant")
    for (row, _, end), text, spans in zip(asked, found.texts, found.spans):
        if end == REPLY:
            row.prompt = text
        else:
            row.wholes.append(text)
            row.spans.append(spans)
    if loss_on == "assistant":
        _write_turns([row for row in chats if row.spans[0] is None], render)
    return found.reads


def _joined(prompt: Messages | None, completion: Messages) -> Messages:
    """Prompt and completion as one chat; a message that the prompt begins goes on."""
    if not prompt:
        return completion
    begins = prompt[-1]["role"] == "assistant" == completion[0]["role"]
    if not begins or "tool_calls" in prompt[-1]:
        return [*prompt, *completion]
    text = (prompt[-1].get("content") or "") + (completion[0].get("content") or "")
    return [*prompt[:-1], prompt[-1] | completion[0] | {"content": text}, *completion[1:]]


def _write_turns(rows: Sequence[_Row], render: Render) -> None:
    """Sets the spans of the assistant's turns of chats whose template has no marks.

    A turn is what its message adds to the text of those before it, after the assistant's opening.
    """
    chats = [_joined(row.written.prompt, row.written.completions[0]) for row in rows]
    turns = [
        (row, chat, i)
        for row, chat in zip(rows, chats)
        for i, message in enumerate(chat)
        if message["role"] == "assistant"
    ]
    asked = [(row, chat[:i], OPEN) for row, chat, i in turns]
    asked += [(row, chat[: i + 1], CLOSED) for row, chat, i in turns]
    if not asked:
        return
    texts = render(asked, False).texts
    for row in rows:
        row.spans = [[]]
    for (row, _, i), before, after in zip(turns, texts, texts[len(turns) :]):
        if not (row.wholes[0].startswith(after) and after.startswith(before)):
            raise ValueError(
                'sft.loss_on = "assistant", but the chat template has no {% generation %} marks, '
                f"and writes message {i} of {row.written.where} otherwise when others follow, so "
                "that its tokens cannot be told from the rest. Take a template with marks, or one "
                'that keeps earlier turns as they are, or set sft.loss_on = "completion".'
            )
        row.spans[0].append((len(before), len(after)))


def _render(
    renderer: Renderer,
    tokenizer: Any,
    now: datetime | None,
    on_text: Callable[[int, int], None],
    asked: Sequence[tuple[_Row, Messages, str]],
    with_spans: bool,
) -> templates.Rendered:
    try:
        return renderer.render(
            tokenizer,
            [messages for _, messages, _ in asked],
            [row.written.arguments for row, _, _ in asked],
            now=now,
            on_text=lambda done: on_text(done, len(asked)),
            ends=[end for _, _, end in asked],
            with_spans=with_spans,
        )
    except templates.TemplateError as error:
        where = asked[error.number][0].written.where
        if error.missing and not tokenizer.chat_template:
            raise ValueError(
                f"{where} is a chat, and the tokenizer has no chat template. Use a tokenizer with "
                "one, or write the rows as texts and leave data.chat False."
            ) from error
        raise ValueError(
            f"{where} is a chat, which the tokenizer's template did not accept ({error}). Mend the "
            "row, or give the template what it asks for in data.chat_template_kwargs or a column "
            "`tools` or `chat_template_kwargs`."
        ) from error


# --- Tokens ---------------------------------------------------------------------------------------


def _tokenize(rows: Sequence[_Row], tokenizer: Any, *, special: bool) -> None:
    """Sets the tokens of rows. `special`: with those that the tokenizer adds itself."""
    if not rows:
        return
    for row in rows:
        for text in (row.prompt or "", *row.wholes):
            prompts.refuse_half(text, row.written.where)
    with_prompt = [row for row in rows if row.prompt is not None]
    for row, ids in zip(with_prompt, _ids((r.prompt for r in with_prompt), tokenizer, special)):
        row.prompt_ids = ids
    flat = [(row, k) for row in rows for k in range(len(row.wholes))]
    texts = [row.wholes[k] for row, k in flat]
    marked = any(row.spans[k] is not None for row, k in flat)
    if not marked:
        for (row, _), ids in zip(flat, _ids(texts, tokenizer, special)):
            row.whole_ids.append(np.asarray(ids, np.int32))
            row.chosen.append(None)
        return
    found = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    for (row, k), ids, offsets in zip(flat, found["input_ids"], found["offset_mapping"]):
        row.whole_ids.append(np.asarray(ids, np.int32))
        row.chosen.append(_overlap(row.spans[k], np.asarray(offsets).reshape(-1, 2)))


def _ids(texts: Iterable[str], tokenizer: Any, special: bool) -> list[list[int]]:
    texts = list(texts)
    if not texts:
        return []
    rows = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    rows = [list(ids) for ids in rows]
    return prompts.without_second_start(texts, rows, tokenizer) if special else rows


def _overlap(spans: list[Span] | None, offsets: np.ndarray) -> np.ndarray:
    """True for tokens of which a part lies in a span of characters, bool [tokens].

    As transformers does for `return_assistant_tokens_mask`. No token of `spans` None.
    """
    chosen = np.zeros(len(offsets), bool)
    for first, past in spans or []:
        chosen |= (offsets[:, 0] < past) & (offsets[:, 1] > first)
    return chosen


def _end(row: _Row, end: int, stops: set[int]) -> bool:
    """Ends the completions with a stop token; whether one was added that the chat's text lacks."""
    added = False
    for k, (ids, chosen) in enumerate(zip(row.whole_ids, row.chosen)):
        if row.written.is_chat:
            last = row.written.completions[k][-1]
            past = len(row.prompt_ids)
            if last["role"] != "assistant" or stops & set(ids[past:].tolist()[-4:]):
                continue
        elif len(ids) and ids[-1] == end:
            continue
        added = True
        row.whole_ids[k] = np.append(ids, np.int32(end))
        if chosen is not None:
            row.chosen[k] = np.append(chosen, True)
    return added


def _is_unmarked(row: _Row, stops: set[int]) -> bool:
    """Whether the token after a turn of the assistant ends it, and is not trained on."""
    ids, chosen = row.whole_ids[0], row.chosen[0]
    if chosen is None or not len(ids):
        return False
    after = np.flatnonzero(chosen[:-1] & ~chosen[1:]) + 1
    return bool(stops & set(ids[after].tolist()))


# --- Parts and limits -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A row as it is trained on."""

    prompt_ids: Ids
    completions: tuple[Ids, ...]
    chosen: np.ndarray | None
    is_whole: bool  # a text or chat without a prompt, or whose prompt is trained on too


def _parts(row: _Row, tokenizer: Any, loss_on: str) -> _Parts:
    """Prompt and completions of a row; the first token of a whole text stands for its prompt."""
    written = row.written
    whole, chosen = row.whole_ids[0], row.chosen[0]
    if written.prompt is None or loss_on == "all":
        if len(whole) < 2:
            raise ValueError(
                f"{written.where} encodes to one token, which nothing predicts. Leave the row out, "
                "or write more."
            )
        if written.prompt is not None:
            _prompt_ids(row, tokenizer)
        chosen = None if chosen is None else chosen[1:]
        parts = _Parts(whole[:1], (whole[1:],), chosen, True)
    else:
        prompt_ids = _prompt_ids(row, tokenizer)
        at = len(prompt_ids)
        chosen = None if chosen is None else chosen[at:]
        parts = _Parts(prompt_ids, tuple(ids[at:] for ids in row.whole_ids), chosen, False)
    if chosen is not None and not chosen.any():
        raise ValueError(
            f'sft.loss_on = "assistant", but {written.where} has no token of an assistant to train '
            'on. Leave the row out, or set sft.loss_on = "completion".'
        )
    return parts


def _prompt_ids(row: _Row, tokenizer: Any) -> Ids:
    """The prompt's tokens, with which all wholes begin; ValueError if they do not."""
    prompt_ids = np.asarray(row.prompt_ids, np.int32)
    shared = min(_common(prompt_ids, ids) for ids in row.whole_ids)
    where = row.written.where
    if shared < len(prompt_ids) and not row.written.is_implicit:
        text = tokenizer.decode(prompt_ids[shared:])
        told = tokenizer.decode(row.whole_ids[0][shared : shared + 8])
        why = "the chat template writes the prompt otherwise when a completion follows"
        mend = "Take a template that keeps it, or set data.chat_template_kwargs as it needs"
        if not row.written.is_chat:
            why = "tokens reach over the end of the prompt"
            mend = "End the prompt before the space, and begin the completion with it"
        raise ValueError(
            f"The prompt of {where} is no prefix of prompt and completion: from token {shared} on "
            f"it is {text!r}, and with the completion {told!r}; {why}. {mend}."
        )
    if not shared:
        raise ValueError(
            f"The prompt of {where} encodes to no tokens, and at least 1 is needed. Leave the row "
            "out, or begin it with a text that both completions have."
        )
    return prompt_ids[:shared]


def _common(ids: Ids, other: Ids) -> int:
    """The number of tokens with which both begin."""
    n = min(len(ids), len(other))
    differs = np.flatnonzero(ids[:n] != other[:n])
    return int(differs[0]) if len(differs) else n


def _cut(parts: list[_Parts], rows: Sequence[Written], kind: str, limits: Limits) -> Encoded:
    """The examples within the limits; ValueError for a longer one that is refused."""
    prompt = [len(p.prompt_ids) for p in parts]
    completion = [max(map(len, p.completions)) + p.is_whole for p in parts]
    for lengths, most, done, name, option, noun in (
        (prompt, limits.prompt, limits.overlong, limits.names[0], "data.overlong", "prompt"),
        (completion, limits.completion, limits.too_long, *limits.names[1:], "completion"),
    ):
        longer = [i for i, n in enumerate(lengths) if n > most]
        if longer and done == "refuse":
            if kind == "pair" and noun == "completion":
                both = parts[longer[0]].completions
                noun = f"{'chosen' if len(both[0]) >= len(both[1]) else 'rejected'} completion"
            raise _too_long(rows[longer[0]], lengths, longer, most, name, option, noun)
    examples: list[Any] = []
    places = []
    num_dropped = num_truncated = 0
    for part, row, p, c in zip(parts, rows, prompt, completion):
        done = {limits.overlong} if p > limits.prompt else set()
        done |= {limits.too_long} if c > limits.completion else set()
        if "drop" in done:
            num_dropped += 1
            continue
        if done:
            part = _shortened(part, limits)
            if part.chosen is not None and not part.chosen.any():  # nothing is left to learn
                num_dropped += 1
                continue
            num_truncated += 1
        examples.append(_MADE[kind](part, row))
        places.append(row.where)
    done = {"num_dropped": num_dropped, "num_truncated": num_truncated}
    return Encoded(examples, **done, places=tuple(places))


def _shortened(part: _Parts, limits: Limits) -> _Parts:
    """The last tokens of the prompt, and the first of the completions."""
    most = limits.completion - part.is_whole
    return _Parts(
        part.prompt_ids[-limits.prompt :],
        tuple(ids[:most] for ids in part.completions),
        None if part.chosen is None else part.chosen[:most],
        part.is_whole,
    )


def _too_long(
    row: Written,
    lengths: list[int],
    longer: list[int],
    most: int,
    name: str,
    option: str,
    noun: str,
) -> ValueError:
    if row.prompt is None:
        noun = "chat" if row.is_chat else "text"
    return ValueError(
        f"{name} = {most}, but the {noun} of {row.where} has {lengths[longer[0]]} tokens with its "
        f"stop token; {len(longer)} of {len(lengths)} rows are longer than that, the longest with "
        f'{max(lengths)}. Raise it, or set {option} to "drop" or "truncate".'
    )


_MADE: dict[str, Callable[[_Parts, Written], Any]] = {
    "example": lambda part, row: Example(part.prompt_ids, part.completions[0], part.chosen),
    "pair": lambda part, row: Pair(part.prompt_ids, *part.completions, row.value),
    "unpaired": lambda part, row: Unpaired(part.prompt_ids, part.completions[0], row.value),
}
