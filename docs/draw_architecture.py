"""Writes what docs/architecture.md shows of the code: its files by room, its imports, a picture.

    python docs/draw_architecture.py

The tables stand between the marks in the page, and the picture in docs/pictures/step.svg. A test
compares both with the code.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "grpo_jax"
PAGE = DOCS / "architecture.md"

# What a step does, from left to right: (column, row, title, file, what it gives).
BOXES = {
    "prompts": (0, 1, "prompts of the step", "data/prompts", "prompt_PQ"),
    "engine": (1, 1, "sample G completions", "sampling/engine", "completion_PGC, logp_PGC"),
    "rewards": (2, 0, "reward, in processes", "rewards/pool", "reward_PG"),
    "prepare": (2, 2, "score old, reference", "learner/experience", "old, ref logp_PGC"),
    "advantage": (3, 0, "advantage in the group", "algorithm/advantages", "advantage"),
    "pack": (3, 2, "pack tokens into rows", "learner/packing", "token_SNDX"),
    "loss": (4, 1, "loss and gradient", "algorithm/losses", "gradient, metrics"),
    "optimizer": (5, 1, "one optimizer step", "learner/accumulate", "TrainState"),
}
ARROWS = (
    ("prompts", "engine"),
    ("engine", "rewards"),
    ("engine", "prepare"),
    ("rewards", "advantage"),
    ("prepare", "pack"),
    ("advantage", "loss"),
    ("pack", "loss"),
    ("loss", "optimizer"),
)
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 176, 66, 30, 22, 14


def picture() -> str:
    """The flow of a step's arrays, as SVG."""
    columns = 1 + max(box[0] for box in BOXES.values())
    rows = 1 + max(box[1] for box in BOXES.values())
    width = 2 * _MARGIN + columns * _WIDTH + (columns - 1) * _GAP_X
    height = 2 * _MARGIN + rows * _HEIGHT + (rows - 1) * _GAP_Y + 34
    corner = lambda column, row: (  # noqa: E731
        _MARGIN + column * (_WIDTH + _GAP_X),
        _MARGIN + row * (_HEIGHT + _GAP_Y),
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for begin, end in ARROWS:
        (x0, y0), (x1, y1) = corner(*BOXES[begin][:2]), corner(*BOXES[end][:2])
        x0, y0, y1 = x0 + _WIDTH, y0 + _HEIGHT / 2, y1 + _HEIGHT / 2
        lines.append(
            f'<path d="M{x0},{y0} C{x0 + 18},{y0} {x1 - 18},{y1} {x1},{y1}" fill="none" '
            'stroke="#555" marker-end="url(#tip)"/>'
        )
    (x0, _), (x1, _) = corner(5, 1), corner(1, 1)
    x0, x1, low = x0 + _WIDTH / 2, x1 + _WIDTH / 2, height - _MARGIN - 12
    top = corner(0, 1)[1] + _HEIGHT
    lines.append(
        f'<path d="M{x0},{top} L{x0},{low} L{x1},{low} L{x1},{top}" fill="none" stroke="#555" '
        'stroke-dasharray="5 4" marker-end="url(#tip)"/>'
    )
    lines.append(f'<text x="{x1 + 12}" y="{low - 6}" fill="#555">new weights, next step</text>')
    for column, row, title, file, gives in BOXES.values():
        x, y = corner(column, row)
        lines.append(
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#eef3fa" '
            'stroke="#36c"/>'
        )
        for text, below, style in (
            (title, 20, 'font-weight="bold"'),
            (f"{file}.py", 38, 'fill="#36c"'),
            (gives, 56, 'fill="#555"'),
        ):
            lines.append(f'<text x="{x + 9}" y="{y + below}" {style}>{text}</text>')
    return "\n".join([*lines, "</svg>", ""])


def files() -> str:
    """A table of the files by room, each with the first sentence of its docstring."""
    lines = []
    rooms = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    for room in rooms:
        name = str(room.relative_to(PACKAGE))
        lines += [f"\n**{'the root' if name == '.' else name + '/'}**\n", "| file | holds |"]
        lines.append("| --- | --- |")
        for path in sorted(room.glob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text()))
            if path.name != "__init__.py" and text:
                first = re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0]
                lines.append(f"| `{path.name}` | {' '.join(first.split())} |")
    return "\n".join(lines).strip() + "\n"


def imports() -> str:
    """The table of who may import whom, as the test holds it."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    try:
        import test_imports
    finally:
        sys.path.pop(0)
    lines = ["| room | imports |", "| --- | --- |"]
    for block in test_imports.blocks():
        for room, named in block.items():
            order = [r for b in test_imports.blocks() for r in b if r in named]
            lines.append(f"| {room} | {', '.join(order) or 'nothing of ours'} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its tables as the code is now."""
    for mark, made in (("files", files()), ("imports", imports())):
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}{made}{end}{tail}"
    return text


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    (DOCS / "pictures" / "step.svg").write_text(picture())


if __name__ == "__main__":
    main()
