"""Trains a policy by GRPO: `python -m grpo_jax.train --config configs/quickstart.py`.

Run again with the same workdir, it goes on where it was stopped.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax.config import arguments, definitions
from grpo_jax.messages import events
from grpo_jax.messages.console import print_title, say
from grpo_jax.metrics.summary import summary_table
from grpo_jax.run import claim
from grpo_jax.run.stop import StopSignal
from grpo_jax.setup import model
from grpo_jax.trainers import check, grpo, grpo_run, sft
from grpo_jax.trainers.listeners import Callback


def main(argv: list[str]) -> None:
    with claim.held(), StopSignal(may_exit=True) as stop:
        with stop.nothing_to_lose():
            config, folder, others, is_check = arguments.of_run(argv, "train")
            cli.join_processes(config, others)
            stop.save_before_s = config.checkpoint.save_before_s
            if is_check:
                _prepare(config, folder)
                return check.check(config, folder)
        with cli.told(config, folder):
            run(config, folder, stop)


def run(
    config: ConfigDict, folder: Path, stop: StopSignal, callbacks: tuple[Callback, ...] = ()
) -> dict[str, Any]:
    """Trains by the config, or continues the run in `folder`; prints and returns its summary.

    Raises as `grpo.run` does.
    """
    with stop.nothing_to_lose():
        _prepare(config, folder)
        model_path, began = config.model.path, time.monotonic()
        if not model_path:
            grpo_run.refuse_early(config, folder)
    if not model_path:  # a new model first learns the form of answers from worked solutions
        steps, epochs = config.sft.num_steps, config.sft.num_epochs
        length = f"{epochs:g} epochs of" if epochs else f"{steps} updates on"
        print_title(f"Supervised start: {length} worked solutions")
        model_path = str(sft.run(config, folder / "bootstrap", stop, is_start=True))
    steps, epochs = config.loop.num_steps, config.loop.num_epochs
    length = f"{epochs:g} epochs in steps" if epochs else f"{steps} steps"
    print_title(f"GRPO: {length} of {config.batch.prompts} prompts")
    for line in definitions.in_force(config):
        say(line)
    summary = grpo.run(
        config,
        folder,
        model_path,
        spent_s=time.monotonic() - began,
        stop=stop,
        callbacks=callbacks,
    )
    events.happened("finished", f"Run finished: {folder}", **summary)
    ask = summary.pop("ask", None)
    summary_table(summary)
    if ask:
        say(f"Ask it:\n{ask}", whole=True)
    return summary


def _prepare(config: ConfigDict, folder: Path) -> None:
    """Sets up JAX's devices and settings by the config."""
    cli.use_all_cores(config, model.model_shape(config, folder).num_params)
    cli.show_devices()
    cli.use_nan_checks(config.debug.nans)
    if config.compile_cache:
        cli.use_compile_cache(config.mesh, traced=bool(config.profile.steps))


class _Program(types.ModuleType):
    """This module, which can be called: `grpo_jax.train(...)` trains from Python."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`grpo_jax.api.training.train`, which has the documentation."""
        return importlib.import_module("grpo_jax.api.training").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Program


if __name__ == "__main__":
    cli.main(main)
