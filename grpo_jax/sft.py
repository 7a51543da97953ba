"""Trains a model on worked solutions: `python -m grpo_jax.sft --config configs/sft.py`."""

from __future__ import annotations

from grpo_jax import cli
from grpo_jax.config import arguments, derived
from grpo_jax.messages import events
from grpo_jax.messages.console import say
from grpo_jax.run import stop as stop_lib
from grpo_jax.setup import model
from grpo_jax.trainers import sft


def main(argv: list[str]) -> None:
    config, folder, others, _ = arguments.of_run(argv, "sft")
    cli.join_processes(config, others)
    if not derived.is_supervised(config):
        raise ValueError("sft.num_steps = 0: nothing to train. Set it or sft.num_epochs above 0.")
    cli.use_all_cores(config, model.model_shape(config, folder).num_params)
    cli.show_devices()
    cli.use_nan_checks(config.debug.nans)
    if config.compile_cache:
        cli.use_compile_cache(config.mesh)
    save_before_s = config.checkpoint.save_before_s
    with cli.told(config, folder), stop_lib.StopSignal(save_before_s, may_exit=True) as stop:
        export = sft.run(config, folder, stop)
        events.happened("finished", f"Run finished: {folder}", export=str(export))
        say(f"The trained model is in {export}.", always=True)


if __name__ == "__main__":
    cli.main(main)
