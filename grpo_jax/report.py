"""Draws a run's curves again, or several runs beside each other: `python -m grpo_jax.report`.

    python -m grpo_jax.report DIR           writes DIR/curves.png and DIR/curves.svg
    python -m grpo_jax.report DIR DIR2 ...  writes comparison.png and comparison.svg

Runs that go on are drawn as far as they are. `--workdir DIR` is the same as DIR. With --dark the
pictures are for a dark page, and those of one run are called curves_dark.
"""

from __future__ import annotations

from pathlib import Path

from grpo_jax.config import parsers
from grpo_jax.evaluation.compare import names
from grpo_jax.metrics import curves


def main(argv: list[str] | None = None) -> None:
    """Draws the picture of one or more runs; ends with one line if there is nothing to draw."""
    parser = parsers.report()
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(str(Path(folder)) for folder in args.folders + args.workdir))
    if not folders:
        parser.error("give the folder of a run, or of several to compare")
    try:
        if len(folders) == 1:
            print(curves.curves(folders[0], dark=args.dark))
        else:
            found = [str(Path(folder).resolve()) for folder in folders]
            print(curves.compare(folders, names(found), Path(args.out), dark=args.dark))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
