"""Draws a run's curves again, of one that goes on or has ended: `python -m grpo_jax.report`.

    python -m grpo_jax.report --workdir DIR

writes DIR/curves.png.
"""

from __future__ import annotations

import argparse

from grpo_jax.config import arguments
from grpo_jax.metrics import curves


def main(argv: list[str] | None = None) -> None:
    """Draws the picture of `--workdir`; ends with one line where there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog=arguments.prog("report"), description="Draw curves.png from a run's metrics."
    )
    parser.add_argument("--workdir", required=True, help="folder of the run")
    workdir = parser.parse_args(argv).workdir
    try:
        print(curves.curves(workdir))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
