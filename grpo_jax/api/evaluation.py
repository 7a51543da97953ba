"""Evaluates a model on problems with the rewards of a config."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax import evaluate as program
from grpo_jax.api import options as options_lib
from grpo_jax.evaluation import estimates
from grpo_jax.evaluation.estimates import Estimate


def evaluate(
    model: str | Path, config: ConfigDict, given: tuple[Any, Any, Any], chosen: Mapping[str, Any]
) -> dict[str, Estimate]:
    """Metrics by name, with 95 % intervals, as from `python -m grpo_jax.evaluate`.

    `given`: rewards, data and held-out data as for `train`; None: the config's. `chosen`: options
    of the config by name; `num_samples`, `temperature` and `num_problems` mean those of
    `evaluation`.
    """
    own = ("num_samples", "temperature", "num_problems", "reference")
    chosen = {f"evaluation.{n}" if n in own else n: value for n, value in chosen.items()}
    config = options_lib.make_config(config, None, *given, chosen)
    asked = types.SimpleNamespace(
        config="the call", models=[str(model)], split="eval", json=None,
        num_problems=config.evaluation.num_problems, num_samples=config.evaluation.num_samples,
        temperature=config.evaluation.temperature, top_p=config.rollout.top_p,
        top_k=config.rollout.top_k, max_tokens=config.rollout.max_tokens, seed=config.seed,
        dtype=config.model.dtype, out=str(Path(model) / "evaluations" / "asked"),
    )  # fmt: skip
    program.check(asked)
    with cli.held_settings():
        _, (evaluated,) = program.evaluate(asked, config)
    return {name: estimates.estimate(tally) for name, tally in evaluated.tallies.items()}
