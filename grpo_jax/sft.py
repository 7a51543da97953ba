"""Supervised training: `python -m grpo_jax.sft --config configs/sft.py`."""

from __future__ import annotations

from grpo_jax import cli
from grpo_jax.trainers import sft


def main(argv: list[str]) -> None:
    cli.train_on_given(argv, "sft", "sft", sft.run)


if __name__ == "__main__":
    cli.main(main)
