"""The plan of an update on given completions, from shapes alone: `grpo_jax.plan --program dpo`.

Rows stand at the config's limits. The programs are those of the update; scoring the reference
before, and held-out rows, takes less memory than its gradient.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import rules
from grpo_jax.devices import sharding
from grpo_jax.planning import topologies
from grpo_jax.planning.given_programs import GivenStep
from grpo_jax.planning.plan import Plan
from grpo_jax.setup.learner import make_supervised_learner
from grpo_jax.structs import ModelConfig, Rollouts
from grpo_jax.trainers import preference, reward_model, rollout, sft
from grpo_jax.trainers.given import Given


def row_of(program: str, config: ConfigDict) -> Given:
    """The row of `given.py` of a program's name."""
    if program == "dpo":
        return preference.row_of(config)
    return {"sft": sft.SFT, "reward_model": reward_model.REWARD_MODEL}[program]


def advice(program: str) -> str:
    """What to change where an update does not fit."""
    section = {"dpo": "preference"}.get(program, program)
    return (
        f"Lower {section}.microbatch or {section}.max_tokens, set model.remat = full, "
        "optim.moments_dtype = int8 or optim.offload, or split the model by mesh.fsdp."
    )


def plan(
    program: str,
    config: ConfigDict,
    model: ModelConfig,
    topology: str,
    lengths: tuple[int, int] = (0, 0),
) -> Plan:
    """The plan of an update of a program: "sft", "dpo" or "reward_model".

    `lengths`: the prompt's tokens and the mean of completions; 0: at their limits. Raises
    ValueError if the mesh does not fit the devices or the model.
    """
    row = row_of(program, config)
    chip, devices = topologies.devices(topology)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    rules.check_heads(model.num_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    model = dataclasses.replace(model, head=row.head)
    learner = make_supervised_learner(
        config,
        model,
        mesh,
        max(config[row.section].num_steps, 1),
        component=row.component(config),
        section=row.section,
        group=row.group,
    )
    laid_out = laid_out_rows(row, config, sharding.num_row_shards(mesh), *lengths)
    step = GivenStep(config, model, mesh, learner, laid_out, row.fields(config), row.phase)
    shape = dict(mesh.shape)
    return Plan(topology, chip, shape, model.num_params, step.held(), step.compile())


def laid_out_rows(
    row: Given, config: ConfigDict, shards: int, prompt_tokens: int = 0, mean_tokens: int = 0
) -> Rollouts:
    """The rows of an update, on the host, with lengths as in `plan`."""
    schedule, rng = config[row.section], np.random.default_rng(config.seed)
    most, shape = schedule.max_tokens, (schedule.batch, row.group)
    length_BG = np.full(shape, most)
    if mean_tokens:
        length_BG = np.minimum(rng.geometric(1 / mean_tokens, shape), most)
    prompt = [0] * (prompt_tokens or config.data.max_prompt_tokens)
    # Completions of a pair differ from their first token on: nothing but the prompt is shared.
    rows = [
        row.row_of(prompt, [[1 + g] * int(n) for g, n in enumerate(length_G)])
        for length_G in length_BG
    ]
    return rollout.cut(row.rollouts(rows, shards, config))
