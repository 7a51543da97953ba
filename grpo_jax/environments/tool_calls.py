"""Reads turns of the policy: what it said, what it thought, and its calls of tools.

transformers' `chat_parsing` reads a turn by a declarative template, and raises for all of it if any
call is malformed, or takes a call without an end for whole. So a turn is cut at its calls first, by
control tokens and not by texts that spell them, and each call is read alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_jax.environments.call_formats import CALLS, REASONING, Format
from grpo_jax.environments.spelling import Spelling
from grpo_jax.environments.turns import Call, Malformed, Turn

_ERRORS = (ValueError, KeyError, TypeError, RecursionError)  # what a template raises for a text
_MISSING = re.compile(r"missing key '(name|arguments|parameters)'|'\{(name|arguments)\}' is not")
_REASON_CHARS = 300  # of a reason that the model is told


@dataclasses.dataclass(frozen=True)
class _Span:
    """A call in a turn's text: all of it, and its body between opening and end."""

    first: int
    body: int
    body_past: int
    past: int
    has_end: bool
    at_end: bool  # it ends where the turn does, without a mark of its own


class Reader:
    """Reads turns in one format of calls."""

    def __init__(
        self,
        form: Format,
        spelling: Spelling,
        tools: Sequence[dict[str, Any]] = (),
        opening: str = "",
    ):
        """`tools`: JSON schemas, by which texts become numbers in formats without types.

        `opening`: what the chat template writes of each turn before the policy goes on.
        """
        from transformers.utils.chat_parsing.response_templates import load_response_template

        self.form = form
        self._spelling = spelling
        self._tools = list(tools)
        self._template = load_response_template(form.template)
        fields = form.template["fields"]
        self._reasoning = next((name for name in REASONING if name in fields), None)
        self._cut = self._template
        if CALLS in fields:
            kept = _without_names(_anchors(fields[CALLS]) | form.anchors)
            cut = form.template | {"fields": fields | {CALLS: kept | {"repeats": True}}}
            self._cut = load_response_template(cut)
        self._begun = _begun(form, self._template, opening)

    def read(self, ids: Sequence[int]) -> Turn:
        """The turn that these ids are, its stop token included if it ended with one."""
        said, mark = self._spelling.guarded(ids)
        text = self._begun + said
        stop = self._spelling.control.get(ids[-1], "") if len(ids) else ""
        calls: list[Call | Malformed] = []
        rest, end = [], 0
        for span in self._spans(text):
            rest.append(text[end : span.first])
            end = span.past
            calls += self._calls(text, span)
        calls = [
            dataclasses.replace(call, text=call.text.removesuffix(stop))
            if isinstance(call, Malformed)
            else call
            for call in calls
        ]
        turn = self._said("".join([*rest, text[end:]]).removesuffix(stop))
        return _unmarked(dataclasses.replace(turn, calls=tuple(calls)), mark)

    def _said(self, text: str) -> Turn:
        """A turn's text without its calls, as content and reasoning."""
        from transformers.utils.chat_parsing import parse_response

        try:
            message = parse_response(text, self._template, prefix="")
        except _ERRORS:
            return Turn(text.strip())
        content, reasoning = message.get("content"), message.get(self._reasoning)
        return Turn(
            content if isinstance(content, str) else "",
            reasoning if isinstance(reasoning, str) else "",
        )

    def _spans(self, text: str) -> Iterator[_Span]:
        """The calls in a text, as transformers' parser finds them: not inside the reasoning."""
        fields = [f for f in self._cut.fields.values() if f.open_re is not None]
        end = 0
        while True:
            found = [(m, f) for f in fields if (m := f.open_re.search(text, end))]
            if not found:
                return
            opened, field = min(found, key=lambda f: (f[0].start(), -f[0].end(), f[1].name))
            closed = field.close_re.search(text, opened.end()) if field.close_re else None
            past = closed.end() if closed else len(text)
            if field.name == CALLS:
                yield _Span(
                    *(opened.start(), opened.end(), closed.start() if closed else past, past),
                    has_end=closed is not None or field.close_re is None,
                    at_end=closed is not None and closed.end() == closed.start() == len(text),
                )
            if past >= len(text):
                return
            end = past if past > opened.start() else past + 1

    def _calls(self, text: str, span: _Span) -> list[Call | Malformed]:
        """The calls between one opening and its end; formats that are lists have several."""
        whole = text[span.first : span.past]
        if not span.has_end:
            return [Malformed("unclosed", "The call has no end.", whole)]
        found = self._call(whole, span)
        found = found if isinstance(found, list) else [found]
        parts = _objects(text[span.body : span.body_past])
        if len(parts) < 2 or all(isinstance(call, Call) for call in found):
            return found
        # Several in one, of which at least one is malformed: each alone.
        calls: list[Call | Malformed] = []
        opened, closed = text[span.first : span.body], text[span.body_past : span.past]
        for part in parts:
            one = self._call(opened + part + closed, span)
            calls += [
                dataclasses.replace(call, text=part) if isinstance(call, Malformed) else call
                for call in (one if isinstance(one, list) else [one])
            ]
        return calls

    def _call(self, whole: str, span: _Span) -> list[Call | Malformed] | Malformed:
        from transformers.utils.chat_parsing import parse_response

        try:
            message = parse_response(whole, self._template, prefix="", tools=self._tools)
        except _ERRORS as error:
            return _malformed(error, whole, span.at_end)
        if self.form.rest is not None and (fault := self._fault(whole)):
            return Malformed("syntax", fault, whole)
        found = message.get(CALLS)
        if not found:
            return Malformed("syntax", "The call is not in the format of calls.", whole)
        calls: list[Call | Malformed] = []
        for item in found if isinstance(found, list) else [found]:
            item = item if isinstance(item, dict) else {"function": item}
            function = item.get("function", item)
            several = function if isinstance(function, list) else [function]
            calls += [_checked(one, item.get("id"), whole) for one in several]
        return calls

    def _fault(self, whole: str) -> str | None:
        """What is wrong with a call of parameters in tags, which are read leniently."""
        field = self._template.fields[CALLS]
        body = whole[opened.end() :] if (opened := field.open_re.match(whole)) else whole
        left = re.sub(field.content_args["tag_pattern"], "", body, flags=re.DOTALL)
        left = "".join(left.split())
        if left == self.form.rest:
            return None
        return f"The call holds {left[:80]!r}, which is no parameter between its two tags."


def _checked(function: Any, name_of_call: Any, text: str) -> Call | Malformed:
    """A call as the template read it, if it names a tool and its arguments."""
    if not isinstance(function, dict):
        kind = type(function).__name__
        return Malformed("syntax", f"The call must be an object, and is of type {kind}.", text)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        return Malformed("name", 'The call has no text as "name" of the tool.', text)
    if arguments is None and "arguments" not in function:
        arguments = {}  # as TRL 1.16: a tool without parameters
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        fault = f'"arguments" of the call must be an object, and is of type {kind}.'
        return Malformed("arguments", fault, text)
    named = name_of_call or function.get("id")
    return Call(name.strip(), arguments, named if isinstance(named, str) else "")


def _malformed(error: Exception, text: str, at_end: bool) -> Malformed:
    """What a template's error says of a call."""
    if missing := _MISSING.search(str(error)):
        kind = "name" if (key := missing[1] or missing[2]) == "name" else "arguments"
        return Malformed(kind, f'The call has no "{key}".', text)
    cause = error.__cause__
    if isinstance(cause, json.JSONDecodeError):
        if at_end and (cause.pos >= len(cause.doc.rstrip()) or "Unterminated" in cause.msg):
            return Malformed("unclosed", "The call has no end.", text)
        near = cause.doc[max(cause.pos - 20, 0) : cause.pos + 20]
        fault = f"The call is not valid JSON: {cause.msg}, near {near!r}."
        return Malformed("syntax", fault[:_REASON_CHARS], text)
    return Malformed("syntax", "The call is not in the format of calls.", text)


def _objects(text: str) -> list[str]:
    """The outermost JSON objects in a text, by their braces; the last one may have no end."""
    found, depth, first, in_string, escaped = [], 0, 0, False, False
    for i, char in enumerate(text):
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"' and depth:
            in_string = True
        elif char == "{":
            first = first if depth else i
            depth += 1
        elif char == "}" and depth:
            depth -= 1
            if not depth:
                found.append(text[first : i + 1])
    return [*found, text[first:]] if depth else found


def _begun(form: Format, template: Any, opening: str) -> str:
    """What a template's opening of a turn holds of the turn itself: a begun reasoning."""
    if form.is_own:
        return template.truncate_past_last_anchor(opening) if opening else ""
    at = opening.rfind("<think>")
    return opening[at:] if at >= 0 else ""


def _anchors(field: dict[str, Any]) -> dict[str, Any]:
    """Where a field begins and ends."""
    return {k: v for k, v in field.items() if k.startswith(("open", "close"))}


def _without_names(anchors: dict[str, Any]) -> dict[str, Any]:
    """Patterns without names of groups, which only a transform may use."""
    return {
        key: re.sub(r"\(\?P<\w+>", "(", value) if isinstance(value, str) else value
        for key, value in anchors.items()
    }


def _unmarked(value: Any, mark: str) -> Any:
    """A value without a mark in its texts, at every depth."""
    if isinstance(value, str):
        return value.replace(mark, "")
    if isinstance(value, dict):
        return {_unmarked(k, mark): _unmarked(v, mark) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unmarked(v, mark) for v in value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(**_unmarked(fields, mark))
    return value
