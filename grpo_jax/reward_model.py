"""Trains a reward model: `python -m grpo_jax.reward_model --config configs/reward_model.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax.trainers import given_check, reward_model, sft


def main(argv: list[str]) -> None:
    run, head = reward_model.run, reward_model.REWARD_MODEL.head
    cli.train_on_given(argv, "reward_model", "reward_model", run, _check, head)


def _check(config: ConfigDict, folder: Path) -> None:
    row = reward_model.REWARD_MODEL
    if not config.model.path:  # a new model is first trained on worked solutions
        given_check.check(sft.SFT, config, folder / "bootstrap")
        row = dataclasses.replace(row, new_policy=reward_model.new_policy)
    given_check.check(row, config, folder)


cli.make_callable(__name__, "grpo_jax.api.given:reward_model")


if __name__ == "__main__":
    cli.main(main)
