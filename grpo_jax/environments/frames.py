"""What a chat template writes around messages of an environment, rendered once per shape.

A group of messages is rendered after a made conversation, with slots for what it says. What stands
after the stop token of the assistant's turn in it is the frame: control tokens, and texts with
slots. So messages cost no rendering, and what they say is encoded with the frame's text around it,
as one render would be, but without control tokens.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from grpo_jax.data.chats import TOOLS
from grpo_jax.data.templates import OPEN, Renderer
from grpo_jax.environments.spelling import Spelling

Message = dict[str, Any]

MARK = "zqmarkqz"  # the end of what the made assistant says
QUESTION = "zqaskqz"
_SLOT = re.compile(r"zqslot\d+qz|zqid\d{3}qz|zqname\d+qz")
_STARTS = 1000  # prompts whose frames are kept
_AT_ONCE = 8  # results in a group, up to which groups are rendered before a run starts
# Mistral's templates want names of calls of nine letters and digits.
_CALL_ID = re.compile(r"[0-9A-Za-z]{9}")


def slot(number: int) -> str:
    """The text in whose place a message's content comes."""
    return f"zqslot{number}qz"


def call_id(number: int) -> str:
    """The text in whose place the name of a call comes, of nine letters and digits."""
    return f"zqid{number:03}qz"


def tool_name(number: int) -> str:
    """The text in whose place the name of the tool comes that gave a result."""
    return f"zqname{number}qz"


# What templates make of a message's content.
WRITTEN: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "stripped": str.strip,
    "as JSON": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],  # quotes are the frame's
    "stripped, as JSON": lambda text: json.dumps(text.strip(), ensure_ascii=False)[1:-1],
}
_PROBE = " \n\"A\" 'é' <b>&\\\n\t{x}\n "  # each of WRITTEN makes something else of it


@dataclasses.dataclass(frozen=True)
class _Words:
    """Text between control tokens, and whether those swallow the white space at its ends."""

    text: str
    strip_left: bool
    strip_right: bool


@dataclasses.dataclass(frozen=True)
class Frame:
    """A text with slots, after a control token, or after other text, or at the start."""

    text: str
    after: int | None  # None: no control token
    pieces: tuple[int | tuple[int, ...] | _Words, ...]
    is_start: bool  # nothing stands before it

    def ids(
        self, values: dict[str, str], spelling: Spelling, *, allow_control: bool = False
    ) -> list[int]:
        """The ids with these values in its slots, by the text of each slot."""
        if allow_control:
            before = "" if self.after is None else spelling.control[self.after]
            return spelling.full(before + _filled(self.text, values))[bool(before) :]
        ids: list[int] = []
        for number, piece in enumerate(self.pieces):
            if isinstance(piece, int):
                ids.append(piece)
            elif isinstance(piece, tuple):
                ids += piece
            else:
                text = _filled(piece.text, values)
                text = text.lstrip() if piece.strip_left else text
                text = text.rstrip() if piece.strip_right else text
                ids += spelling.plain(text, is_start=self.is_start and number == 0)
        return ids


def _filled(text: str, values: dict[str, str]) -> str:
    return _SLOT.sub(lambda found: values.get(found[0], found[0]), text)


def make_frame(text: str, after: int | None, spelling: Spelling, *, is_start: bool = True) -> Frame:
    """A text with slots, cut at its control tokens; those without slots are encoded at once.

    `is_start`: nothing stands before it, if it follows no control token.
    """
    is_start &= after is None
    cut = spelling.pieces((spelling.control[after] if after is not None else "") + text)
    if after is not None:
        assert cut[0] == (after, True), "a control token is one piece"
    tokens = [piece if is_control else None for piece, is_control in cut]
    pieces: list[int | tuple[int, ...] | _Words] = []
    for number, (piece, is_control) in enumerate(cut):
        if is_control:
            pieces.append(piece)
            continue
        left = tokens[number - 1] if number else None
        right = tokens[number + 1] if number + 1 < len(cut) else None
        if _SLOT.search(piece):
            swallows_left = left is not None and spelling.strips(left)[1]
            swallows_right = right is not None and spelling.strips(right)[0]
            pieces.append(_Words(piece, swallows_left, swallows_right))
        else:
            pieces.append(tuple(spelling.plain(piece, is_start=is_start and number == 0)))
    return Frame(text, after, tuple(pieces[after is not None :]), is_start)


class Frames:
    """The frames of one chat template, its tools and arguments, by the shape of a group."""

    def __init__(
        self,
        tokenizer: Any,
        renderer: Renderer,
        spelling: Spelling,
        *,
        tools: Sequence[dict[str, Any]],
        stop_ids: Sequence[int],
        arguments: dict[str, Any],
        now: datetime | None,
    ):
        self._tokenizer, self._renderer, self.spelling = tokenizer, renderer, spelling
        self._now = now
        self.arguments = arguments | ({TOOLS: list(tools)} if tools else {})
        self.tool_names = [str(tool.get("function", tool).get("name")) for tool in tools]
        self.stop_ids = frozenset(stop_ids)
        self.takes_several = True  # calls in one turn; some templates refuse a second
        self._frames: dict[tuple[str, ...], Frame] = {}
        self._starts: dict[str, Frame] = {}
        self._written: dict[str, str] = {}  # by role, a name of WRITTEN

    def close(self) -> None:
        """Ends the renderer's process; it starts again if it is needed."""
        self._renderer.close()

    def render(
        self,
        conversations: Sequence[Sequence[Message]],
        ends: Sequence[str],
        arguments: Sequence[dict[str, Any]] | None = None,
    ) -> list[str]:
        """Conversations as texts, as `data.templates` renders them; it raises TemplateError."""
        given = list(arguments or [self.arguments] * len(conversations))
        return self._renderer.render(
            self._tokenizer, conversations, given, now=self._now, ends=ends
        ).texts

    def group(self, messages: Sequence[Message]) -> Frame:
        """The frame of a group of messages, with the opening of the assistant's next turn."""
        shape = tuple(self.role(message) for message in messages)
        if shape not in self._frames:
            self.make([shape])
        return self._frames[shape]

    def make(self, shapes: Sequence[tuple[str, ...]]) -> None:
        """Renders groups of these shapes, which are roles in their order."""
        texts = self.render([self.after_turn(s) for s in shapes], [OPEN] * len(shapes))
        self._frames |= {shape: self.after_stop(text) for shape, text in zip(shapes, texts)}

    def make_usual(self, roles: Sequence[str]) -> None:
        """Renders the groups that most episodes have, so that a run seldom renders one."""
        numbers = range(1, _AT_ONCE + 1) if "tool" in roles else ()
        tools = [("tool",) * number for number in numbers]
        self.make([*tools, *([("user",)] if "user" in roles else [])])

    def starts(
        self,
        prompts: Sequence[Sequence[Message]],
        arguments: Sequence[dict[str, Any] | None],
    ) -> list[Frame]:
        """The frames of prompts with a slot each; the episodes of a problem share one."""
        given = [self.arguments if asked is None else asked for asked in arguments]
        rows = list(zip(prompts, given))
        keys = [json.dumps([list(p), of], sort_keys=True, default=str) for p, of in rows]
        new = {key: row for key, row in zip(keys, rows) if key not in self._starts}
        if len(self._starts) + len(new) > _STARTS:
            self._starts.clear()
            new = dict(zip(keys, rows))
        if new:
            messages, of_rows = zip(*new.values())
            texts = self.render(messages, [OPEN] * len(new), of_rows)
            made = [make_frame(text, None, self.spelling) for text in texts]
            self._starts |= dict(zip(new, made))
        return [self._starts[key] for key in keys]

    def role(self, message: Message) -> str:
        """The role of an environment's message: a tool, or else the user."""
        return "tool" if message.get("role") == "tool" and self.tool_names else "user"

    def written(self, text: str, message: Message) -> str:
        """What the template makes of a message's content."""
        return WRITTEN[self._written[self.role(message)]](text)

    def written_last(self, text: str) -> str:
        """What the template makes of a text at the end of a message of the user."""
        first = "x"  # it keeps the white space before the text
        return WRITTEN[self._written["user"]](first + text)[len(first) :]

    def asks_for_names(self, messages: Sequence[Message]) -> bool:
        """Whether the template writes the names of calls beside their results."""
        return "zqid" in self.group(messages).text

    def learn_roles(self, roles: Sequence[str]) -> None:
        """Finds what the template makes of contents of each role.

        Raises ValueError for a template that drops them, or changes them in another way than
        WRITTEN has.
        """
        for of in roles:
            slotted = self.after_turn([of]) if of == "tool" else asking(slot(0))
            probed = [*slotted[:-1], slotted[-1] | {"content": _PROBE}]
            with_slot, with_probe = self.render([slotted, probed], [OPEN, OPEN])
            if slot(0) not in with_slot:
                raise ValueError(
                    f"The chat template drops what a message of the role {of!r} says: it renders "
                    f"{with_slot[-300:]!r}. The model would never read the answers of "
                    "its environment. Use a model whose template has this role, or give its "
                    "tokenizer another template."
                )
            head, _, tail = with_slot.partition(slot(0))
            found = with_probe[len(head) : len(with_probe) - len(tail)]
            names = [name for name, make in WRITTEN.items() if make(_PROBE) == found]
            if not names or with_probe != head + found + tail:
                raise ValueError(
                    f"The chat template changes what a message of the role {of!r} says: of "
                    f"{_PROBE!r} it makes {with_probe[-300:]!r}. It may leave it as it "
                    "is, strip it, or write it as JSON. Give the tokenizer such a template."
                )
            self._written[of] = names[0]

    def after_turn(self, shape: Sequence[str]) -> list[Message]:
        """The made conversation before a group of this shape, and the group with its slots."""
        num_calls = next((i for i, of in enumerate(shape) if of != "tool"), len(shape))
        said: Message = {"role": "assistant", "content": MARK}
        calls = range(num_calls) if self.takes_several else range(min(num_calls, 1))
        if calls:
            said = calling([(tool_name(i), {"x": MARK if i == calls[-1] else "1"}) for i in calls])
        group = [{"role": of, "content": slot(i)} for i, of in enumerate(shape)]
        for i in range(num_calls):
            call = min(i, calls[-1])
            group[i] |= {"name": tool_name(call), "tool_call_id": call_id(call)}
        return [*asking(QUESTION), said, *group]

    def after_stop(self, text: str) -> Frame:
        """What follows the stop token of the made turn in a rendered conversation."""
        text = text[text.rindex(MARK) + len(MARK) :]
        pieces = self.spelling.pieces(text)
        for number, (piece, is_control) in enumerate(pieces):
            if is_control and piece in self.stop_ids:
                rest = "".join(
                    self.spelling.control[p] if is_id else p for p, is_id in pieces[number + 1 :]
                )
                return make_frame(rest, piece, self.spelling)
        stops = [self.spelling.control.get(i, str(i)) for i in sorted(self.stop_ids)]
        raise ValueError(
            f"The chat template ends a turn of the assistant with none of the model's stop tokens, "
            f"{', '.join(stops)}: after the turn it writes {text[:200]!r}. Then the model would "
            "never learn to end a turn. Give the tokenizer a template that ends turns, or name its "
            "token in eos_token_id of the model's generation_config.json."
        )


def asking(content: str) -> list[Message]:
    """A conversation that is one message of the user."""
    return [{"role": "user", "content": content}]


def calling(calls: Sequence[tuple[str, dict[str, Any]]], **fields: Any) -> Message:
    """A message of the assistant that calls tools."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": call_id(i), "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(calls)
        ],
    } | fields


def with_slot(prompt: Sequence[Message]) -> list[Message]:
    """A prompt with a slot at the end of its last message, if that is the user's; else after it."""
    *before, last = prompt or asking("")
    if last["role"] != "user":
        return [*prompt, *asking(slot(0))]
    return [*before, last | {"content": f"{last['content'] or ''}{slot(0)}"}]


def values_of(
    messages: Sequence[Message], contents: Sequence[str], ids: Sequence[str], *, first: int = 0
) -> dict[str, str]:
    """What comes in the slots of a group: contents as they are written, names of tools and calls.

    `ids`: the names that the model gave its calls, or "". `first`: the number of the first slot.
    """
    values = {slot(first + i): text for i, text in enumerate(contents)}
    for i, message in enumerate(messages):
        given = str(message.get("tool_call_id") or (ids[i] if i < len(ids) else ""))
        values[call_id(first + i)] = given if _CALL_ID.fullmatch(given) else f"call{i:05}"
        values[tool_name(first + i)] = str(message.get("name") or "unknown")
    return values
