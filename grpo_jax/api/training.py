"""`grpo_jax.train`: a run of GRPO from a script or a notebook."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax import train as program
from grpo_jax.api import options as options_lib
from grpo_jax.api.options import Environments, Reward
from grpo_jax.api.trained import Trained
from grpo_jax.config.arguments import Processes
from grpo_jax.hosts import processes
from grpo_jax.messages import console
from grpo_jax.messages.console import say
from grpo_jax.run import claim
from grpo_jax.run.stop import Stopped, StopSignal
from grpo_jax.trainers.listeners import Step


def train(
    model: str | Path | None = None,
    rewards: Reward | Sequence[Reward | tuple[Reward, float]] | None = None,
    data: Any = None,
    eval_data: Any = None,
    *,
    workdir: str | Path | None = None,
    tools: Sequence[str | Callable] | None = None,
    environments: Environments | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    config: str | Path | ConfigDict | None = None,
    **options: Any,
) -> Trained:
    """Trains a model by GRPO, or continues the run in `workdir`; returns the `Trained` run.

        run = grpo_jax.train("Qwen/Qwen2.5-0.5B-Instruct", rewards=[correct, (short, 0.1)],
                             data=dataset, workdir="runs/a", group=8, learning_rate=1e-6)

    `model`: a Hugging Face folder or hub id. `rewards`: functions, names of built-in rewards or
    "module:function", or pairs of one of these and its weight; a function is called by keyword, as
    in TRL, `f(prompts, completions, **columns) -> list[float | None]`. `data`, `eval_data`: a path,
    a hub id, a `datasets.Dataset`, a data frame or a list of dicts, with a column `prompt`.
    `tools`: functions that the policy may call; `environments`: a class whose instances it talks
    to, or several by the names in the column `environment` (docs/environments.md).
    `callbacks`: each is called with a `Step` when its metrics are known, and may `stop()` the run.
    `config`: a config file, or a config, in place of the defaults. `options`: options of the config
    (docs/options.md) by name: `group=8`, `**{"batch.group": 8}`, or a section as a dict,
    `optim={"schedule": "linear"}`.

    The default `workdir` is `runs/` and the time. A run stopped by a callback or Ctrl-C saves
    itself, and the same call continues it. Raises ValueError for a user's mistake.
    """
    made = options_lib.make_config(
        config, model, rewards, data, eval_data, options, tools, environments
    )

    def run(folder: Path, stop: StopSignal) -> None:
        program.run(made, folder, stop, tuple(callbacks))

    return carry_out(made, workdir, run, (rewards, data, eval_data))


def carry_out(
    config: ConfigDict,
    workdir: str | Path | None,
    run: Callable[[Path, StopSignal], None],
    kept: tuple[Any, ...],
) -> Trained:
    """A run of any trainer in its folder. `kept`: rewards and data, as `Trained` takes them."""
    folder = Path(workdir or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    is_finished = False
    with cli.held_settings():
        cli.join_processes(config, Processes())
        with claim.held(), StopSignal(config.checkpoint.save_before_s) as stop:
            try:
                with cli.told(config, folder):
                    run(folder, stop)
                is_finished = True
            except Stopped as stopped:
                say(str(stopped), always=True)
            except ValueError as error:
                error.args = (in_python(str(error)),)
                raise
            finally:
                console.show_as("auto")
        processes.barrier("the end of a run")
    return Trained(folder, config, is_finished, kept)


def in_python(message: str) -> str:
    """A message with arguments of `train` in place of the command line's, which have hyphens."""
    message = re.sub(r"--(config\.(?=\w)|(?=workdir\b))", "", message)
    return re.sub(r"data\.(?:eval_)?path(?:: | = )'?python:(data|eval_data)\b'?", r"\1", message)
