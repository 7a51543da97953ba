"""Training on preferences: `python -m grpo_jax.dpo --config configs/dpo.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax.trainers import given_check, preference, sft


def main(argv: list[str]) -> None:
    cli.train_on_given(argv, "dpo", "preference", preference.run, _check)


def _check(config: ConfigDict, folder: Path) -> None:
    row = preference.row_of(config)
    if not config.model.path:  # a new model is first trained on worked solutions
        given_check.check(sft.SFT, config, folder / "bootstrap")
        row = dataclasses.replace(row, new_policy=sft.SFT.new_policy)
    given_check.check(row, config, folder)


cli.make_callable(__name__, "grpo_jax.api.given:dpo")


if __name__ == "__main__":
    cli.main(main)
