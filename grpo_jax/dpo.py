"""Training on preferences: `python -m grpo_jax.dpo --config configs/dpo.py`."""

from __future__ import annotations

from grpo_jax import cli
from grpo_jax.trainers import preference


def main(argv: list[str]) -> None:
    cli.train_on_given(argv, "dpo", "preference", preference.run)


if __name__ == "__main__":
    cli.main(main)
