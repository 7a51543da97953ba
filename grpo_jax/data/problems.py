"""Problems: a prompt, and the further columns that reward functions read.

A source's rows (`sources.py`) have a column `prompt`, a text or chat messages, or columns that
`data.columns` and `data.template` make a prompt of; the same columns stand in every row.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import string
from typing import Any

from grpo_jax.data import sources
from grpo_jax.data.sources import Source
from grpo_jax.messages import cut

Messages = list[dict[str, Any]]  # chat: each with a "role" and a "content"

# Names that a reward function's own arguments have.
_RESERVED = ("prompts", "completions")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prompt and what its rewards may need to know."""

    prompt: str | Messages
    columns: dict[str, Any]
    where: str = dataclasses.field(default="", compare=False)  # "train.jsonl, line 3", for messages


@dataclasses.dataclass(frozen=True)
class Form:
    """How a row becomes a problem: the options `data.*` of these names.

    Raises ValueError for renames that are not "ours=theirs" or contradict each other, and for a
    template that is not text with names of columns in braces.
    """

    columns: tuple[str, ...] = ()
    template: str = ""
    chat: bool = False
    system: str = ""

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
        if self.template and not self.fields:
            raise ValueError(
                f"data.template = {cut(repr(self.template))} has no {{column}}, so that all "
                'prompts would be the same. Put the column in, such as "{prompt}".'
            )

    @functools.cached_property
    def renames(self) -> dict[str, str]:
        """Our name of each renamed column by the source's."""
        return {theirs: ours for ours, theirs in (entry.split("=") for entry in self.columns)}

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The columns that the template names."""
        shown = f"data.template = {cut(repr(self.template))}"
        rule = "Write {column} for a column, and {{ and }} for braces of the text."
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"{shown}: {error}. {rule}") from error
        found = []
        for _, field, spec, conversion in parts:
            if field is None:
                continue
            if not field.strip() or spec or conversion or set(field) & set(".[]{}"):
                mark = f"!{conversion}" * bool(conversion) + f":{spec}" * bool(spec)
                raise ValueError(f"{shown}: {{{field}{mark}}} is not the name of a column. {rule}")
            found.append(field)
        return tuple(dict.fromkeys(found))


# --- What a run reads -----------------------------------------------------------------------------


def load_train(data: Any) -> list[Problem]:
    """The training problems that a config's section `data` names."""
    return load(Source(data.path, data.name, data.split), _form(data))


def load_held_out(data: Any) -> list[Problem]:
    """The held-out problems that a config's section `data` names; none where it names none."""
    if data.eval_path:
        options = ("data.eval_path", "data.eval_name", "data.eval_split")
        source = Source(data.eval_path, data.eval_name, data.eval_split, options)
    elif data.eval_split:
        if not sources.has_splits(data.path):
            raise ValueError(
                f"data.eval_split = {data.eval_split!r}, but data.path = {data.path!r} is one set "
                "of problems without splits. Set data.eval_path to a file of held-out problems."
            )
        options = ("data.path", "data.name", "data.eval_split")
        source = Source(data.path, data.name, data.eval_split, options)
    else:
        return []
    return load(source, _form(data))


def _form(data: Any) -> Form:
    return Form(data.columns, data.template, data.chat, data.system)


def load(source: Source, form: Form = Form()) -> list[Problem]:
    """The problems of a source, in its order.

    Raises ValueError, naming the option, the file and the row, for what cannot be read, a source
    without rows, a row whose columns differ from the first's, a missing, blank or mistyped prompt,
    and a row that `form` does not fit.
    """
    problems: list[Problem] = []
    first_where, first_columns = "", set()
    for where, row in sources.read(source):
        if not problems:
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
        problems.append(_problem(row, where, source.options[0], form))
    if not problems:
        raise ValueError(
            f"{source.options[0]}: {source.path} is empty; it needs one row for each problem "
            "(in JSONL one JSON object a line)."
        )
    return problems


# --- From a row to a problem ----------------------------------------------------------------------


def _problem(row: dict[str, Any], where: str, option: str, form: Form) -> Problem:
    columns = _renamed(row, where, form.renames) if form.renames else dict(row)
    taken = [name for name in _RESERVED if name in columns]
    if taken:
        raise ValueError(
            f"{option}: {where} has a column `{taken[0]}`, which is an argument of every reward "
            "function. Rename the column, as data.columns can."
        )
    if form.template:
        columns["prompt"] = _filled(columns, where, form)
    if "prompt" not in columns:
        raise ValueError(
            f"{option}: {where} has no `prompt`; it has {', '.join(columns) or 'no columns'}. Name "
            "the column that holds it in data.columns, such as prompt=question, or make it by "
            "data.template."
        )
    prompt = columns.pop("prompt")
    fault = _prompt_fault(prompt)
    if fault:
        raise ValueError(
            f"{option}: {where}: `prompt` {fault}: {cut(json.dumps(prompt, default=str))}. It "
            'must be a text, or a list of messages such as {"role": "user", "content": "..."}.'
        )
    return Problem(_as_chat(prompt, where, form), columns, where)


def _renamed(row: dict[str, Any], where: str, renames: dict[str, str]) -> dict[str, Any]:
    for theirs, ours in renames.items():
        if theirs not in row:
            raise ValueError(
                f"data.columns: {where} has no column `{theirs}` that could become `{ours}`; it "
                f"has {', '.join(row) or 'no columns'}."
            )
        if ours in row and ours not in renames:
            raise ValueError(
                f"data.columns makes `{theirs}` the column `{ours}`, but {where} has a `{ours}` "
                f"already. Rename that one too, such as old_{ours}={ours}."
            )
    return {renames.get(name, name): value for name, value in row.items()}


def _filled(columns: dict[str, Any], where: str, form: Form) -> str:
    """The template with the row's values."""
    for name in form.fields:
        if name not in columns:
            raise ValueError(
                f"data.template names {{{name}}}, but {where} has no such column; it has "
                f"{', '.join(columns) or 'no columns'}."
            )
        value = columns[name]
        if value is None or isinstance(value, (list, dict)):
            kind = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(
                f"data.template names {{{name}}}, but in {where} `{name}` is {kind}: "
                f"{cut(json.dumps(value, default=str))}. A template takes texts and numbers; "
                "leave out data.template where prompts are chat messages."
            )
    if not any(str(columns[name]).strip() for name in form.fields):
        raise ValueError(f"data.template: in {where} `{'`, `'.join(form.fields)}` is blank.")
    return form.template.format_map(columns)


def _as_chat(prompt: str | Messages, where: str, form: Form) -> str | Messages:
    """The prompt as messages where the form wants them, its system message first."""
    if isinstance(prompt, str):
        if not form.chat:
            if form.system:
                raise ValueError(
                    f"data.system is set, but the prompt of {where} is a plain text, which has no "
                    "system message. Set data.chat to True, or data.system to nothing."
                )
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if form.system and not any(message["role"] == "system" for message in prompt):
        return [{"role": "system", "content": form.system}, *prompt]
    return prompt


def _prompt_fault(prompt: Any) -> str | None:
    """What is wrong with a prompt, or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is blank"
    if not isinstance(prompt, list):
        return f"is a {type(prompt).__name__}"
    for i, message in enumerate(prompt):
        if not isinstance(message, dict):
            return f"has a {type(message).__name__} as message {i}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"has no text as `{key}` of message {i}"
    return None if any(m["content"].strip() for m in prompt) else "holds no text"
