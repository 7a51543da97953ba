"""Rows that a script or a notebook gives as objects, not by path.

Such rows have the path "python:NAME" in `data.path` or `data.eval_path`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "python:"
_ROWS: dict[str, Any] = {}


def give(name: str, rows: Any) -> str:
    """Registers rows under a name, in place of earlier ones; returns their path for `data.path`.

    `rows`: a `datasets.Dataset`, a data frame of pandas, or one dict per row, by column. Raises
    ValueError for anything else.
    """
    if isinstance(rows, Mapping):
        parts = ", ".join(map(repr, rows)) or "nothing"
        raise ValueError(
            f"{name} holds {parts} by name, not rows: choose one part, such as "
            f'{name}=dataset["train"].'
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = rows.to_dict("records")
    elif not is_dataset(rows):
        if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
            raise ValueError(
                f"{name} is a {type(rows).__name__}. Give a path or hub id, a datasets.Dataset, a "
                "data frame, or a list of dicts such as {'prompt': '1+1=', 'answer': '2'}."
            )
        rows = list(rows)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{name}, row {number} is a {type(row).__name__}. Each row is a dict, such as "
                    "{'prompt': '1+1=', 'answer': '2'}."
                )
    _ROWS[name] = rows
    return PREFIX + name


def is_dataset(rows: Any) -> bool:
    """Whether rows are a `datasets.Dataset`; does not import that library."""
    return hasattr(rows, "with_format") and hasattr(rows, "iter")


def find(path: str) -> Any:
    """The rows of a path from `give`; None if there are none."""
    return _ROWS.get(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None
