"""A run as one HTML page: curves, options, sampled completions, and what evaluations changed.

The page loads nothing from elsewhere, so it may be sent. Texts of the model are shown as texts,
never as HTML.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.messages.console import cut_middle, plain, visible
from grpo_jax.metrics import curves
from grpo_jax.metrics import history as history_lib
from grpo_jax.run.append_log import read_jsonl

_TEMPLATE = Path(__file__).with_name("page.html")
_MAX_CHARS = 4000  # of a text
_MAX_SAMPLES = 4000  # the last ones
_MAX_PROBLEMS = 1000  # of an evaluation, the first ones
_KEPT = ("step", "prompt", "columns", "completion", "rewards", "length")


def write(workdir: str | Path, changed: Iterable[tuple[str, Any, Any]]) -> Path:
    """Writes `report.html` in a run's folder, and the curves that it holds; returns its path.

    `changed`: options that differ from their defaults: name, value and default. Raises ValueError
    if there are no metrics.
    """
    workdir = Path(workdir)
    history = history_lib.read(workdir)
    heads = ("option", "value", "default")
    parts = {
        "TITLE": html.escape(history.name),
        "TOLD": html.escape(history.told()),
        "CURVES": _drawing(curves.curves(workdir).with_suffix(".svg")),
        "DARK_CURVES": _drawing(curves.curves(workdir, dark=True).with_suffix(".svg")),
        "SUMMARY": _summary(workdir / "summary.json"),
        "OPTIONS": _table("Options that are not the defaults", heads, changed),
        "DATA": _data(workdir),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    text = re.sub(r"@([A-Z_]+)@", lambda found: parts[found[1]], text)
    target = workdir / "report.html"
    unfinished = target.with_name(f"{target.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, target)
    return target


def _drawing(file: Path) -> str:
    """An SVG for the page, whose marks have names that no other drawing of the page has."""
    text = file.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    own = f"{file.stem}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{own}", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{own}" ', 1)


def _summary(file: Path) -> str:
    if not file.exists():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    short = lambda value: f"{value:.4g}" if isinstance(value, float) else value  # noqa: E731
    return _table("Summary", ("", ""), ((name, short(value)) for name, value in found.items()))


def _table(title: str, heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    cells = lambda kind, row: "".join(  # noqa: E731
        f"<{kind}>{html.escape(visible(str(cell)))}</{kind}>" for cell in row
    )
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    return f"<h2>{title}</h2><table>{head}{body}</table>" if body else ""


def _data(workdir: Path) -> str:
    """Samples and greedy evaluations, as JSON that cannot end its element."""
    file = workdir / "samples.jsonl"
    samples = [_row(row) for row in read_jsonl(file)] if file.exists() else []
    evaluations = {}
    for found in sorted((workdir / "evaluations").glob("step_*_greedy.jsonl")):
        lines = found.read_text(encoding="utf-8").splitlines()[:_MAX_PROBLEMS]
        rows = [json.loads(line) for line in lines]
        step = str(int(found.name.split("_")[1]))
        evaluations[step] = [_row(row) | {"correct": row.get("correct")} for row in rows]
    data = {"samples": samples[-_MAX_SAMPLES:], "evaluations": evaluations}
    return json.dumps(data).replace("<", "\\u003c")


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a row, with texts cut in their middle."""
    shown = lambda text: visible(cut_middle(str(text), _MAX_CHARS))  # noqa: E731
    kept = {name: row[name] for name in _KEPT if name in row}
    columns = {name: shown(value) for name, value in (row.get("columns") or {}).items()}
    texts = {name: shown(row[name]) for name in ("prompt", "completion")}
    return plain(kept | texts | {"columns": columns})
