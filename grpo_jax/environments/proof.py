"""Whether a chat template can hold a conversation that only grows; found out before a run starts.

A template is a program, and may drop calls, move tools to the newest question, or rewrite what was
said. Then the model would be trained in contexts that it never meets, and nothing would fail.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from grpo_jax.data.chats import TOOLS
from grpo_jax.data.templates import CLOSED, OPEN, TemplateError
from grpo_jax.environments import call_formats, frames
from grpo_jax.environments.frames import MARK, QUESTION, Frames, Message, asking, calling
from grpo_jax.environments.tool_calls import Reader
from grpo_jax.environments.turns import Call

TOKENS = 1000  # more than the made environment ever says
_ASK = asking(QUESTION)
_THOUGHT = "zqthinkqz"
_TOOL = "zqtoolqz"
_SHOWN = 300  # characters of each text in a message
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

# Notes on a template that rewrites thinking.
_REWRITES = "The chat template rewrites the thinking of earlier turns; "
KEPT = (
    f"{_REWRITES}here conversations keep what was sampled. With environment.history = "
    '"fork" they go on from what the template writes.'
)
FORKED = f"{_REWRITES}there an episode goes on in what it writes, as a further part."


@dataclasses.dataclass(frozen=True)
class Found:
    """What a template turned out to be."""

    reader: Reader
    close: list[int]  # what ends a turn that was cut by a limit
    thinks: bool  # the template writes reasoning
    replies: bool
    notes: list[str]


def examine(
    made: Frames, tokenizer: Any, tools: Sequence[dict[str, Any]], *, replies: bool
) -> Found:
    """Reads off a template what it does with tools, calls, results and ends of turns.

    Raises ValueError for one that cannot hold a conversation with tools.
    """
    notes: list[str] = []
    if tools:
        _refuse_without_tools(made)
        _refuse_without_calls(made)
        made.takes_several = _takes_several(made)
        if not made.takes_several:
            notes.append(
                "The chat template takes one call in a turn; results of several that the model "
                "makes are written as results of one."
            )
    made.learn_roles(["tool", "user"] if tools else ["user"])
    made.make_usual(["tool"] * bool(tools) + ["user"] * replies)
    asked, opened, closed, thought = _render(
        made,
        [
            (_ASK, CLOSED),
            (_ASK, OPEN),
            ([*_ASK, _saying(MARK)], CLOSED),
            ([*_ASK, _saying(MARK, reasoning_content=_THOUGHT)], CLOSED),
        ],
    )
    made.after_stop(closed)  # it raises where a turn has no end
    opening = opened.removeprefix(asked) if opened.startswith(asked) else ""
    reader = _reader(made, tokenizer, tools, opening)
    thinks = _THOUGHT in thought and "</think>" not in opening  # which may forbid thinking
    return Found(reader, _close(made, closed), thinks, replies, notes)


def compare(made: Frames, dialogue: Any, found: Found) -> list[str]:
    """Compares conversations that grew with one rendering of the whole; returns notes.

    Raises ValueError where they differ in more than earlier thinking.
    """
    cases = _cases(made, found)
    sampled = turns(made, [said for _, steps in cases for said, _, _ in steps])
    (start,) = _render(made, [(_ASK, OPEN)])
    rows, conversations = [], []
    for _, steps in cases:
        ids, messages = made.spelling.full(start), list(_ASK)
        for said, cut, group in steps:
            turn = sampled.pop(0)
            turn = turn[: len(turn) - len(found.close)] if cut else turn
            ids += [*turn, *dialogue.follow(turn, not cut, group)]
            messages += [said, *group]
        rows.append(ids)
        conversations.append((messages, OPEN))
    notes = list(found.notes)
    for (label, _), ids, text in zip(cases, rows, _render(made, conversations)):
        whole = made.spelling.full(text)
        if ids == whole:
            continue
        grown, text = made.spelling.text(ids), made.spelling.text(whole)
        if _THINKING.sub("", grown) != _THINKING.sub("", text):
            raise ValueError(_differs(label, grown, text, ids, whole))
        notes += [KEPT] if KEPT not in notes else []
    return notes


def turns(made: Frames, said: Sequence[Message]) -> list[list[int]]:
    """Messages of the assistant as a model would sample them, their stop tokens included."""
    asked, opened, *closed = _render(
        made, [(_ASK, CLOSED), (_ASK, OPEN), *(([*_ASK, one], CLOSED) for one in said)]
    )
    return [_turn(made, asked, opened, text) for text in closed]


def _turn(made: Frames, asked: str, opened: str, closed: str) -> list[int]:
    """The turn that a rendered conversation ends with, after its opening."""
    spelling = made.spelling
    before, whole = spelling.full(opened), spelling.full(closed)
    if whole[: len(before)] == before:
        ids = whole[len(before) :]
    else:  # the opening begins a reasoning that the closed turn does not have
        turn, opening = closed.removeprefix(asked), opened.removeprefix(asked)
        shared = _shared(turn, opening)
        begun = "<think>" in opening[shared:] and "</think>" not in opening[shared:]
        ids = spelling.full(("\n</think>\n\n" if begun else "") + turn[shared:])
    last = next((i for i, token in enumerate(ids) if token in made.stop_ids), len(ids) - 1)
    return ids[: last + 1]


def refused(error: TemplateError) -> str:
    """The message for a template that raises, or that is not there."""
    if error.missing:
        return (
            f"The tokenizer has no chat template ({error}), and the prompts are messages. Use a "
            "model with one, or write each prompt as one text and leave data.chat False."
        )
    return (
        f"The chat template refuses a made conversation with an environment: {error}. It must take "
        "tools, calls, results and several turns. Give the tokenizer such a template, or what the "
        "template asks for in data.chat_template_kwargs."
    )


def _render(made: Frames, asked: Sequence[tuple[Sequence[Message], str]]) -> list[str]:
    return made.render([messages for messages, _ in asked], [end for _, end in asked])


def _saying(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content} | fields


# --- What a template must not drop ----------------------------------------------------------------


def _refuse_without_tools(made: Frames) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "Says a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "The word."}},
                "required": ["word"],
            },
        },
    }
    given = made.arguments | {TOOLS: [tool]}
    (text,) = made.render([_ASK], [OPEN], [given])
    if _TOOL not in text:
        raise ValueError(
            f"The chat template prints no tools: with one named {_TOOL!r} it renders "
            f"{text[-_SHOWN:]!r}. The model would not know what it may call. Use a model that was "
            "made for tools, or give its tokenizer a template that prints them; an environment "
            "whose only method is `respond` needs neither."
        )


def _refuse_without_calls(made: Frames) -> None:
    said = calling([(made.tool_names[0], {"x": MARK})])
    (text,) = _render(made, [([*_ASK, said], CLOSED)])
    if MARK not in text or made.tool_names[0] not in text[text.find(QUESTION) :]:
        raise ValueError(
            f"The chat template drops calls of tools: of a call of {made.tool_names[0]!r} it "
            f"renders {text[-_SHOWN:]!r}. The form of calls would be unknown. Use a "
            "model that was made for tools, or give its tokenizer a template that writes calls."
        )


def _takes_several(made: Frames) -> bool:
    try:
        (text,) = made.render([made.after_turn(["tool", "tool"])], [OPEN])
    except TemplateError:
        return False
    return MARK in text and frames.slot(0) in text and frames.slot(1) in text


def _close(made: Frames, closed: str) -> list[int]:
    """What ends a turn in the template, up to its stop token."""
    ids = made.spelling.full(closed[closed.rindex(MARK) + len(MARK) :])
    return ids[: next(i for i, token in enumerate(ids) if token in made.stop_ids) + 1]


# --- The format of calls --------------------------------------------------------------------------


def _reader(made: Frames, tokenizer: Any, tools: Sequence[dict[str, Any]], opening: str) -> Reader:
    """A reader that reads calls as the template writes them."""
    formats = call_formats.candidates(tokenizer)
    if not tools:
        return Reader(call_formats.without_calls(formats[0]), made.spelling, (), opening)
    name = made.tool_names[0]
    asked = [[(name, {"x": "a b"})], [(name, {"x": "a"}), (name, {"x": 'b "c"'})]]
    asked = asked if made.takes_several else asked[:1]
    written = turns(made, [calling(calls) for calls in asked])
    for form in formats:
        try:
            reader = Reader(form, made.spelling, tools, opening)
        except ValueError as error:
            assert form.is_own, error
            raise ValueError(
                f"The tokenizer's response_template cannot be used: {error}. Mend it in "
                "tokenizer_config.json, or leave it out if calls are in a known format."
            ) from error
        if all(_reads(reader, turn, calls) for turn, calls in zip(written, asked)):
            return reader
    shown = made.spelling.text(written[0])[:_SHOWN]
    raise ValueError(
        f"The chat template writes a call of the tool {name!r} as {shown!r}, which no known format "
        f"reads: {', '.join(form.name for form in formats)}. Give the tokenizer a "
        "`response_template` that reads it, as transformers' documentation of response parsing "
        "says; tokenizer_config.json may hold it."
    )


def _reads(reader: Reader, ids: Sequence[int], calls: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    turn = reader.read(ids)
    found = [(c.name, c.arguments) for c in turn.calls if isinstance(c, Call)]
    return found == list(calls) and len(turn.calls) == len(calls)


# --- Made conversations ---------------------------------------------------------------------------

_Step = tuple[Message, bool, list[Message]]  # what is said; whether it is cut; the answers


def _cases(made: Frames, found: Found) -> list[tuple[str, list[_Step]]]:
    cases: list[tuple[str, list[_Step]]] = []
    said = _saying("I say.")
    more: list[Message] = [{"role": "user", "content": ' And "then"?\n'}]
    if made.tool_names:
        name = made.tool_names[0]
        call = calling([(name, {"x": "1"})])
        result = [_result(name, "42", 0)]
        step: _Step = (call, False, result)
        cases += [("a call", [step]), ("two calls in turn", [step, step])]
        cases += [("words and a call", [(call | {"content": "I look."}, False, result)])]
        if made.takes_several:
            two = calling([(name, {"x": "1"}), (name, {"x": "2"})])
            results = [_result(name, ' "6" <b>\n', 0), _result(name, "7", 1)]
            cases += [("two parallel calls", [(two, False, results)])]
        if found.thinks:
            thinking = call | {"reasoning_content": _THOUGHT}
            cases += [("thinking and a call", [(thinking, False, result), step])]
        if found.replies:
            cases += [("a call, then an answer of the user", [step, (said, False, more)])]
    if found.replies:
        cases += [("an answer of the user", [(said, False, more), (said, False, more)])]
        cases += [("a turn that a limit cut", [(_saying("I was"), True, more)])]
        if found.thinks:
            thinking = _saying("I say.", reasoning_content=_THOUGHT)
            cases += [("thinking, then an answer of the user", [(thinking, False, more)])]
    return cases


def _result(name: str, content: str, number: int) -> Message:
    call = frames.call_id(number)
    return {"role": "tool", "name": name, "tool_call_id": call, "content": content}


def _differs(label: str, grown: str, whole: str, ids: list[int], rendered: list[int]) -> str:
    if grown == whole:
        where = next(i for i, (a, b) in enumerate(zip(ids, rendered)) if a != b)
        grown = f"{grown} as ids {ids[where : where + 20]}"
        whole = f"{whole} as ids {rendered[where : where + 20]}"
        at = 0
    else:
        at = max(_shared(grown, whole) - 80, 0)
    return (
        f"The chat template does not keep a conversation as it was sampled. With {label}, turns "
        f"that are appended one by one read\n  ...{grown[at:][:_SHOWN]!r}\nand one rendering of "
        f"the whole reads\n  ...{whole[at:][:_SHOWN]!r}\nA model that is trained on the first is "
        "used with the second. Give the tokenizer a template that leaves earlier turns as they "
        "are; for answers of the user alone, an environment without `respond` does."
    )


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with together."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
