"""Trains a reward model: `python -m grpo_jax.reward_model --config configs/reward_model.py`."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax.trainers import given_check, reward_model, sft


def main(argv: list[str]) -> None:
    cli.train_on_given(argv, "reward_model", "reward_model", reward_model.run, _check)


def _check(config: ConfigDict, folder: Path) -> None:
    if config.model.path:
        return given_check.check(reward_model.REWARD_MODEL, config, folder)
    # A new model is first trained on worked solutions; its head is made after that.
    given_check.check(sft.SFT, config, folder / "bootstrap")


cli.make_callable(__name__, "grpo_jax.api.given:reward_model")


if __name__ == "__main__":
    cli.main(main)
