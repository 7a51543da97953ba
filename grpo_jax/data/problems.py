"""Problems: a prompt, and the other columns, which reward functions read.

A source's rows (`sources.py`) have a column `prompt`, a text or chat messages. Or `data.columns`
and `data.prompt_template` make it from other columns. All rows have the same columns.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import string
from collections.abc import Iterable, Iterator
from typing import Any

from grpo_jax.data import chats, sources
from grpo_jax.data.chats import Messages
from grpo_jax.data.sources import Source
from grpo_jax.messages.values import cut

# Arguments of every reward function, which no column may be named.
_RESERVED = ("prompts", "completions")

# Columns that the models here cannot read: without them a prompt is another question.
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prompt, and the columns that its rewards may read."""

    prompt: str | Messages
    columns: dict[str, Any]
    where: str = dataclasses.field(default="", compare=False)  # for messages: "train.jsonl, line 3"
    # Arguments of the chat template besides messages: "tools", and values such as enable_thinking.
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def question(self) -> str:
        """The model's input as one text; equal for problems that a model cannot tell apart."""
        if isinstance(self.prompt, str):
            return self.prompt
        return json.dumps([self.prompt, self.arguments], sort_keys=True, default=str)


@dataclasses.dataclass(frozen=True)
class Form:
    """The conversion of a row to a problem: the options `data.*` of these names.

    A column within a struct has a dotted name, such as reward_model.ground_truth. Raises ValueError
    for renames that are not "ours=theirs" or contradict each other, for a template that is not text
    with names of columns in braces, and for arguments that are not "name=value".
    """

    columns: tuple[str, ...] = ()
    prompt_template: str = ""
    chat: bool = False
    system_prompt: str = ""
    chat_template_kwargs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in self.columns:
            if not isinstance(entry, str) or entry.count("=") != 1 or not all(entry.split("=")):
                raise ValueError(
                    f'data.columns: {entry!r} is not "ours=theirs". Write one text for each '
                    'renamed column, such as ("prompt=question", "answer=solution").'
                )
        for side in (0, 1):
            names = [entry.split("=")[side] for entry in self.columns]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"data.columns = {self.columns}: {twice[0]!r} stands there twice.")
        if self.prompt_template and not self.fields:
            raise ValueError(
                f"data.prompt_template = {cut(repr(self.prompt_template))} has no {{column}}, so "
                'that all prompts would be the same. Put the column in, such as "{prompt}".'
            )
        try:
            chats.refuse_reserved(self.arguments, "data.chat_template_kwargs")
        except ValueError as error:
            raise ValueError(f"{error}.") from error

    @functools.cached_property
    def renames(self) -> dict[str, str]:
        """Our name of each renamed column, by its name in the source."""
        return {theirs: ours for ours, theirs in (entry.split("=") for entry in self.columns)}

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments of all chat templates, by name: JSON or Python literals, else texts."""
        found: dict[str, Any] = {}
        for entry in self.chat_template_kwargs:
            name, equals, text = entry.partition("=") if isinstance(entry, str) else ("", "", "")
            if not equals or not name.isidentifier() or name in found:
                fault = "stands there twice" if name in found else 'is not "name=value"'
                raise ValueError(
                    f"data.chat_template_kwargs: {entry!r} {fault}. Write one text for each "
                    'argument of the chat template, such as ("enable_thinking=False",).'
                )
            value = chats.literal(text)
            plain = value is None or isinstance(value, (str, int, float, list, dict))
            found[name] = value if plain else text
        return found

    @functools.cached_property
    def pieces(self) -> list[tuple[str, str | None]]:
        """The template as texts, each with the column name that follows it."""
        shown = f"data.prompt_template = {cut(repr(self.prompt_template))}"
        rule = "Write {column} for a column, and {{ and }} for braces of the text."
        try:
            parts = list(string.Formatter().parse(self.prompt_template))
        except ValueError as error:
            raise ValueError(f"{shown}: {error}. {rule}") from error
        for _, field, spec, conversion in parts:
            named = field is None or (
                all(name.strip() for name in field.split(".")) and not set(field) & set("[]{}")
            )
            if not named or spec or conversion:
                mark = f"!{conversion}" * bool(conversion) + f":{spec}" * bool(spec)
                raise ValueError(f"{shown}: {{{field}{mark}}} is not the name of a column. {rule}")
        return [(text, field) for text, field, _, _ in parts]

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The columns that the template names."""
        return tuple(dict.fromkeys(field for _, field in self.pieces if field is not None))


# --- What a run reads -----------------------------------------------------------------------------


def load_train(data: Any) -> list[Problem]:
    """The training problems of a config's section `data`."""
    return load(train_source(data), form_of(data))


def load_held_out(data: Any) -> list[Problem]:
    """The held-out problems of a config's section `data`; [] if it names none."""
    source = held_out_source(data)
    return [] if source is None else load(source, form_of(data))


def train_source(data: Any) -> Source:
    """Where a config's section `data` has the training rows."""
    return Source(data.path, data.name, data.split)


def held_out_source(data: Any) -> Source | None:
    """Where it has the held-out rows; None if it names none."""
    if data.eval_path:
        options = ("data.eval_path", "data.eval_name", "data.eval_split")
        return Source(data.eval_path, data.eval_name, data.eval_split, options)
    if data.eval_split:
        if not sources.has_splits(data.path):
            raise ValueError(
                f"data.eval_split = {data.eval_split!r}, but data.path = {data.path!r} is one set "
                "of problems without splits. Set data.eval_path to a file of held-out problems."
            )
        options = ("data.path", "data.name", "data.eval_split")
        return Source(data.path, data.name, data.eval_split, options)
    return None


def form_of(data: Any) -> Form:
    """The `Form` of a config's section `data`."""
    return Form(
        data.columns, data.prompt_template, data.chat, data.system_prompt, data.chat_template_kwargs
    )


def load(source: Source, form: Form = Form()) -> list[Problem]:
    """The problems of a source, in its order.

    Raises ValueError, naming the option, the file and the row, if a file cannot be read, a source
    has no rows, a row's columns differ from the first row's, a prompt is missing, blank or of a
    wrong type, or `form` does not fit a row.
    """
    rows = alike(sources.read(source), source)
    return [_problem(row, where, source.options[0], form) for where, row in rows]


def alike(rows: Iterable[sources.Row], source: Source) -> Iterator[sources.Row]:
    """The rows, checked to have the same columns; ValueError if they differ or there are none."""
    first_where, first_columns = "", None
    for where, row in rows:
        if first_columns is None:
            first_where, first_columns = where, row.keys()
        elif row.keys() != first_columns:
            lacks, adds = sorted(first_columns - row.keys()), sorted(row.keys() - first_columns)
            changes = [f"lacks {', '.join(lacks)}"] * bool(lacks)
            changes += [f"adds {', '.join(adds)}"] * bool(adds)
            raise ValueError(
                f"{source.options[0]}: {where} {' and '.join(changes)}, compared with "
                f"{first_where}. All rows need the same columns; write null where there is no "
                "value."
            )
        yield where, row
    if first_columns is None:
        raise ValueError(
            f"{source.options[0]}: {source.path} is empty; it needs one row for each problem "
            "(in JSONL one JSON object a line)."
        )


# --- From a row to a problem ----------------------------------------------------------------------


def _problem(row: dict[str, Any], where: str, option: str, form: Form) -> Problem:
    columns = renamed(row, where, form.renames) if form.renames else dict(row)
    _refuse_reserved(columns, where, option)
    refuse_media(columns, where, option)
    padded = isinstance(row, sources.Padded)
    if isinstance(columns.get("prompt"), str):
        try:
            columns["prompt"] = chats.in_text(columns["prompt"])
        except ValueError as error:
            raise ValueError(
                f"{option}: {where}: `prompt` {error}: {cut(columns['prompt'])}. Write the "
                "messages as JSON."
            ) from error
    if form.prompt_template:
        columns["prompt"] = filled(columns, where, form)
    if "prompt" not in columns:
        raise ValueError(
            f"{option}: {where} has no `prompt`; it has {', '.join(columns) or 'no columns'}. Name "
            "the column that holds it in data.columns, such as prompt=question, or make it by "
            "data.prompt_template."
        )
    prompt = columns.pop("prompt")
    if padded:
        prompt = chats.without_nulls(prompt)
    fault = prompt_fault(prompt)
    if fault:
        raise ValueError(
            f"{option}: {where}: `prompt` {fault}: {cut(json.dumps(prompt, default=str))}. It "
            'must be a text, or a list of messages such as {"role": "user", "content": "..."}.'
        )
    prompt = as_chat(prompt, where, form)
    if isinstance(prompt, str):
        return Problem(prompt, columns, where)
    try:
        given = chats.given(columns, padded)
    except ValueError as error:
        raise ValueError(f"{option}: {where}: {error}.") from error
    if chats.TOOLS in given:
        columns[chats.TOOLS] = given[chats.TOOLS]
    return Problem(prompt, columns, where, form.arguments | given)


def _refuse_reserved(columns: dict[str, Any], where: str, option: str) -> None:
    taken = [name for name in _RESERVED if name in columns]
    if taken:
        raise ValueError(
            f"{option}: {where} has a column `{taken[0]}`, which is an argument of every reward "
            "function. Rename the column, as data.columns can."
        )


def refuse_media(columns: dict[str, Any], where: str, option: str) -> None:
    """Raises ValueError for a column of images or sound, which are no text."""
    for name in _MEDIA:
        if columns.get(name):
            raise ValueError(
                f"{option}: {where} has a column `{name}`, and the models here read text alone. If "
                "the problems do not need it, rename the column in data.columns, such as "
                f"left_out={name}. Otherwise take other problems."
            )


def _value(columns: dict[str, Any], name: str) -> Any:
    """The value of a column, or of a field in its structs for a dotted name; else _MISSING."""
    if name in columns:
        return columns[name]
    for i in (i for i, letter in enumerate(name) if letter == "."):
        inner = columns.get(name[:i], _MISSING)
        if inner is None:
            return None
        if isinstance(inner, dict):
            found = _value(inner, name[i + 1 :])
            if found is not _MISSING:
                return found
    return _MISSING


def _names(columns: dict[str, Any], name: str) -> str:
    """The existing columns, for a message; if `name` begins with a struct, the struct's keys."""
    head = name.partition(".")[0]
    if head != name and isinstance(columns.get(head), dict):
        columns = {f"{head}.{key}": None for key in columns[head]}
    return cut(", ".join(columns), 200) or "no columns"


def renamed(row: dict[str, Any], where: str, renames: dict[str, str]) -> dict[str, Any]:
    """The row with our names; a value renamed out of a struct stays in the struct, too."""
    within = {}
    for theirs, ours in renames.items():
        value = _value(row, theirs)
        if value is _MISSING:
            raise ValueError(
                f"data.columns: {where} has no column `{theirs}` that could become `{ours}`; it "
                f"has {_names(row, theirs)}."
            )
        if ours in row and ours not in renames:
            raise ValueError(
                f"data.columns makes `{theirs}` the column `{ours}`, but {where} has a `{ours}` "
                f"already. Rename that one too, such as old_{ours}={ours}."
            )
        if theirs not in row:
            within[ours] = value
    return {renames.get(name, name): value for name, value in row.items()} | within


def filled(columns: dict[str, Any], where: str, form: Form) -> str:
    """The template with the row's values."""
    values = {name: _value(columns, name) for name in form.fields}
    for name, value in values.items():
        if value is _MISSING:
            raise ValueError(
                f"data.prompt_template names {{{name}}}, but {where} has no such column; it has "
                f"{_names(columns, name)}."
            )
        if value is None or isinstance(value, (list, dict)):
            kind = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(
                f"data.prompt_template names {{{name}}}, but in {where} `{name}` is {kind}: "
                f"{cut(json.dumps(value, default=str))}. A template takes texts and numbers; "
                "leave out data.prompt_template where prompts are chat messages."
            )
    if not any(str(value).strip() for value in values.values()):
        raise ValueError(f"data.prompt_template: in {where} `{'`, `'.join(form.fields)}` is blank.")
    return "".join(text + ("" if name is None else str(values[name])) for text, name in form.pieces)


def as_chat(prompt: str | Messages, where: str, form: Form) -> str | Messages:
    """The prompt, as messages if the form wants them, with the system message first."""
    if isinstance(prompt, str):
        if not form.chat:
            for option, value in (
                ("system_prompt", form.system_prompt),
                ("chat_template_kwargs", form.chat_template_kwargs),
            ):
                if value:
                    raise ValueError(
                        f"data.{option} is set, but the prompt of {where} is a plain text, which "
                        f"no chat template writes. Set data.chat to True, or data.{option} to "
                        "nothing."
                    )
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    prompt = chats.plain(prompt)
    if form.system_prompt and not any(message["role"] == "system" for message in prompt):
        return [{"role": "system", "content": form.system_prompt}, *prompt]
    return prompt


def prompt_fault(prompt: Any) -> str | None:
    """The fault of a prompt; None for a valid one."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is blank"
    return chats.fault(prompt) if isinstance(prompt, list) else f"is a {type(prompt).__name__}"


def as_reply(problem: Problem, text: str) -> Any:
    """A completion for reward functions: chat messages if the prompt is a chat, else the text."""
    return text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]
