"""Reward for JSON that a schema allows."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from grpo_jax.messages.values import cut
from grpo_jax.rewards.completions import replies

_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)
_MAX_CHARS = 1_000_000  # of a reply; what is longer is no JSON that anybody asked for


def json_schema(
    prompts: list[Any],
    completions: list[Any],
    schema: Any = None,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for each completion that is JSON, and valid under a JSON schema, else 0.0.

    The reply after thinking counts, or its last block between ```json and ```. `schema` is a dict,
    or one as JSON text, bound by the config or a column of the rows; None: any JSON. It is read as
    the draft that it names, 2020-12 by default; nothing is fetched from the network.
    """
    is_column = isinstance(schema, list) and len(schema) == len(completions)
    rows = schema if is_column else [schema] * len(completions)
    texts = replies(prompts, completions, rendered_prompts)
    return [float(_is_valid(text, _key(row))) for text, row in zip(texts, rows)]


def schema_fault(value: Any) -> str | None:
    """The fault of a value that is no schema; None for a schema, and for null, which allows all."""
    if value is None:
        return None
    try:
        _validator(_key(value))
    except Exception as error:  # of any kind, from a schema of any shape
        return f"is no JSON schema ({type(error).__name__}: {cut(str(error), 200)})"
    return None


def _refuse(schema: Any = None) -> None:
    if fault := schema_fault(schema):
        raise ValueError(f"schema {fault}")


json_schema.column_faults = {"schema": schema_fault}
json_schema.refuse = _refuse
json_schema.needs = ("jsonschema",)
json_schema.options = ()


def _key(schema: Any) -> str:
    """A schema as text; "" for none."""
    return schema if isinstance(schema, str) else "" if schema is None else json.dumps(schema)


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """The validator of a schema as text, which fetches nothing."""
    import referencing
    from jsonschema import validators

    read = json.loads(schema)
    made = validators.validator_for(read, default=validators.Draft202012Validator)
    made.check_schema(read)
    if far := next((ref for ref in _references(read) if not ref.startswith("#")), None):
        raise ValueError(f"$ref {far!r} leads out of it; only #... is read")
    return made(read, registry=referencing.Registry())


def _references(schema: Any) -> Iterator[str]:
    """What the schema's $ref name."""
    inside = schema.values() if isinstance(schema, dict) else schema
    for value in inside if isinstance(inside, (list, type({}.values()))) else ():
        yield from _references(value)
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"]


def _is_valid(text: str | None, schema: str) -> bool:
    if text is None or len(text) > _MAX_CHARS:
        return False
    blocks = _FENCE.findall(text)
    try:
        value = json.loads(blocks[-1] if blocks else text, parse_constant=_no_json)
        return not schema or _validator(schema).is_valid(value)
    except (ValueError, RecursionError, OverflowError):
        return False


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity
