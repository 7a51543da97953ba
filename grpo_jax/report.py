"""Draws a run's curves again, or several runs beside each other: `python -m grpo_jax.report`.

    python -m grpo_jax.report DIR           writes DIR/curves.png and DIR/curves.svg
    python -m grpo_jax.report DIR --html    writes DIR/report.html, with completions
    python -m grpo_jax.report DIR DIR2 ...  writes comparison.png and comparison.svg

Runs that go on are drawn as far as they are. `--workdir DIR` is the same as DIR. With --dark the
pictures are for a dark page, and those of one run are called curves_dark.
"""

from __future__ import annotations

import json
from pathlib import Path

from grpo_jax.config import options, parsers
from grpo_jax.config.dotted import flatten
from grpo_jax.evaluation.compare import names
from grpo_jax.metrics import curves, history, page


def main(argv: list[str] | None = None) -> None:
    """Draws the picture of one or more runs; ends with one line if there is nothing to draw."""
    parser = parsers.report()
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(str(Path(folder)) for folder in args.folders + args.workdir))
    if not folders:
        parser.error("give the folder of a run, or of several to compare")
    if args.html and (len(folders) > 1 or args.dark):
        parser.error("--html is for one run, and for light and dark pages alike")
    try:
        if args.html:
            print(page_of(folders[0]))
        elif len(folders) == 1:
            print(curves.curves(folders[0], dark=args.dark))
        else:
            found = [str(Path(folder).resolve()) for folder in folders]
            print(curves.compare(folders, names(found), Path(args.out), dark=args.dark))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def page_of(folder: str | Path) -> Path:
    """Writes a run as one page, `report.html` in its folder; returns its path.

    Raises ValueError if there are no metrics.
    """
    chosen = history.read(folder).options
    default = flatten(options.default())
    known = ((name, value, default[name]) for name, value in chosen.items() if name in default)
    return page.write(folder, [row for row in known if json.dumps(row[1]) != json.dumps(row[2])])


if __name__ == "__main__":
    main()
