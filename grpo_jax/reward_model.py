"""Trains a reward model: `python -m grpo_jax.reward_model --config configs/reward_model.py`."""

from __future__ import annotations

from grpo_jax import cli
from grpo_jax.trainers import reward_model


def main(argv: list[str]) -> None:
    cli.train_on_given(argv, "reward_model", "reward_model", reward_model.run)


if __name__ == "__main__":
    cli.main(main)
