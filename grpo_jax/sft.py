"""Supervised training: `python -m grpo_jax.sft --config configs/sft.py`."""

from __future__ import annotations

import functools

from grpo_jax import cli
from grpo_jax.trainers import given_check, sft


def main(argv: list[str]) -> None:
    check = functools.partial(given_check.check, sft.SFT)
    cli.train_on_given(argv, "sft", "sft", sft.run, check)


cli.make_callable(__name__, "grpo_jax.api.given:sft")


if __name__ == "__main__":
    cli.main(main)
