"""Trains a model on preferences: `python -m grpo_jax.dpo --config configs/dpo.py`."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax.config import arguments, derived
from grpo_jax.messages import events
from grpo_jax.messages.console import print_title, say
from grpo_jax.run import stop as stop_lib
from grpo_jax.run.stop import StopSignal
from grpo_jax.setup import model
from grpo_jax.trainers import preference, sft


def main(argv: list[str]) -> None:
    config, folder, others, _ = arguments.of_run(argv, "dpo")
    cli.join_processes(config, others)
    if not derived.is_supervised(config, "preference"):
        raise ValueError(
            "preference.num_steps = 0: nothing to train. Set it or preference.num_epochs above 0."
        )
    cli.use_all_cores(config, model.model_shape(config, folder).num_params)
    cli.show_devices()
    cli.use_nan_checks(config.debug.nans)
    if config.compile_cache:
        cli.use_compile_cache(config.mesh)
    save_before_s = config.checkpoint.save_before_s
    with cli.told(config, folder), StopSignal(save_before_s, may_exit=True) as stop:
        export = run(config, folder, stop)
        events.happened("finished", f"Run finished: {folder}", export=str(export))
        say(f"The trained model is in {export}.", always=True)


def run(config: ConfigDict, folder: Path, stop: stop_lib.StopSignal) -> Path:
    """Trains, or continues the run in `folder`; returns the exported Hugging Face folder.

    A new model first learns the form of answers from worked solutions. Raises as `preference.run`.
    """
    if config.model.path:
        return preference.run(config, folder, stop)
    preference.refuse_early(config)
    print_title("Supervised start: updates on worked solutions")
    path = sft.run(config, folder / "bootstrap", stop, is_start=True)
    print_title(f"Preferences: {config.preference.loss}")
    return preference.run(config, folder, stop, str(path))


if __name__ == "__main__":
    cli.main(main)
