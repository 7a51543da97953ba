"""`grpo_jax.sft` and its like: training on given completions from a script or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax.api import options as options_lib
from grpo_jax.api.trained import Trained
from grpo_jax.api.training import carry_out
from grpo_jax.config import derived
from grpo_jax.run.stop import StopSignal
from grpo_jax.setup import model as model_lib
from grpo_jax.trainers import given, preference
from grpo_jax.trainers import reward_model as reward_model_lib
from grpo_jax.trainers import sft as sft_lib
from grpo_jax.trainers.given import Given
from grpo_jax.trainers.listeners import Step


def sft(
    model: str | Path | None = None,
    data: Any = None,
    eval_data: Any = None,
    *,
    workdir: str | Path | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    config: str | Path | ConfigDict | None = None,
    **options: Any,
) -> Trained:
    """Trains a model on given completions, or continues the run in `workdir`.

        run = grpo_jax.sft("Qwen/Qwen2.5-0.5B-Instruct", dataset, loss_on="assistant",
                           num_epochs=1.0, learning_rate=1e-5, workdir="runs/a")

    `data`, `eval_data`: a path, a hub id, a `datasets.Dataset`, a data frame or a list of dicts, in
    the types of docs/data.md. Other arguments as of `grpo_jax.train`; a bare name of an option is
    that of the section `sft` if it has one. Raises ValueError for a user's mistake.
    """
    return train(sft_lib.SFT, model, data, eval_data, workdir, callbacks, config, options)


def dpo(
    model: str | Path | None = None,
    data: Any = None,
    eval_data: Any = None,
    *,
    workdir: str | Path | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    config: str | Path | ConfigDict | None = None,
    **options: Any,
) -> Trained:
    """Trains a model on preferences, or continues the run in `workdir`.

        run = grpo_jax.dpo("Qwen/Qwen2.5-0.5B-Instruct", pairs, loss="sigmoid", beta=0.1,
                           num_epochs=1.0, workdir="runs/b")

    Arguments as of `sft`; a bare name of an option is that of the section `preference` if it has
    one. Raises ValueError for a user's mistake.
    """
    given_to = model, data, eval_data, workdir, callbacks, config, options
    return train(preference.PAIRS, *given_to, row_of=preference.row_of)


def reward_model(
    model: str | Path | None = None,
    data: Any = None,
    eval_data: Any = None,
    *,
    workdir: str | Path | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    config: str | Path | ConfigDict | None = None,
    **options: Any,
) -> Trained:
    """Trains a reward model on pairs, or continues the run in `workdir`.

        run = grpo_jax.reward_model("Qwen/Qwen2.5-0.5B-Instruct", pairs, num_epochs=1.0,
                                    workdir="runs/rm")

    Arguments as of `sft`; a bare name of an option is that of the section `reward_model` if it has
    one. `grpo_jax.load_reward_model("runs/rm/export")` scores with it. Raises ValueError for a
    user's mistake.
    """
    given_to = model, data, eval_data, workdir, callbacks, config, options
    return train(reward_model_lib.REWARD_MODEL, *given_to)


def train(
    row: Given,
    model: str | Path | None,
    data: Any,
    eval_data: Any,
    workdir: str | Path | None,
    callbacks: Sequence[Callable[[Step], None]],
    config: str | Path | ConfigDict | None,
    chosen: Mapping[str, Any],
    row_of: Callable[[ConfigDict], Given] | None = None,
) -> Trained:
    """A run of a row of `given`, by the arguments of its function.

    `row_of`: which of several rows of that section it is, by the config; None: `row`.
    """
    of_section = options_lib.in_section(row.section, chosen)
    made = options_lib.make_config(config, model, None, data, eval_data, of_section)
    if not derived.is_supervised(made, row.section):
        raise ValueError(f"Give num_steps or num_epochs: how long grpo_jax.{row.name} trains.")

    def run(folder: Path, stop: StopSignal) -> None:
        cli.set_up(made, model_lib.model_shape(made, folder, row.head).num_params)
        chosen_row = row if row_of is None else row_of(made)
        given.run(chosen_row, made, folder, stop, callbacks=tuple(callbacks))

    return carry_out(made, workdir, run, (None, data, eval_data))
