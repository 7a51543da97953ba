"""Rewards by reward models, computed on the devices: entries "model:FOLDER" of `rewards.names`.

A folder holds a whole model, or an adapter and a head (PEFT's `modules_to_save`), which are read
beside the model that they belong to. A completion's text is written after its prompt as the reward
model's own tokenizer and template write it, and ends as its training's texts did, with the stop
token. What the texts of a group begin with in common is computed once. A text that cannot be scored
raises: a reward of 0 in its place would punish it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.data import masks
from grpo_jax.data.examples import Written
from grpo_jax.data.masks import Limits
from grpo_jax.data.problems import Problem
from grpo_jax.devices import sharding, transfer
from grpo_jax.kernels import choice
from grpo_jax.learner import scalars
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.scalars import Values
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.hf import peft, targets
from grpo_jax.models.policy import Policy
from grpo_jax.rewards import registry
from grpo_jax.rewards.registry import Reward
from grpo_jax.rewards.scores import RewardError
from grpo_jax.setup import lora
from grpo_jax.structs import ModelConfig, Params, Sampling

_OPTION = "rewards.names"


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model on the devices of a mesh."""

    path: str  # as it was given
    policy: Policy
    mesh: Mesh
    params: Params
    values: Values
    now: datetime  # the date for chat templates

    def score(
        self, prompts: Sequence[Any], texts: Sequence[str], group: int = 1, **columns: Any
    ) -> np.ndarray:
        """The rewards of completions, float32 [B].

        `prompts`: a text or messages for each `group` of consecutive completions. `columns`: of
        `Problem`. Every process must call it. Raises RewardError for a text that the model or its
        template does not take.
        """
        problems = [Problem(prompt, {}, **columns) for prompt in prompts]
        return self.of_problems(problems, texts, group)

    def of_problems(
        self, problems: Sequence[Problem], texts: Sequence[str], group: int
    ) -> np.ndarray:
        """As `score`, of problems' prompts."""
        whole = self._encoded([p for p in problems for _ in range(group)], texts)
        by_group = [whole[i : i + group] for i in range(0, len(whole), group)]
        shards = sharding.num_row_shards(self.mesh)
        given = scalars.as_rollouts(by_group, self.policy.pad_id, shards)
        rows = transfer.shard_rows(self.mesh, given)
        call = self.values.call(self.params, rows, given.length_PG, "reward")
        value_PGC = transfer.to_host(call())
        reward_PG = np.where(given.chosen_PGC, value_PGC, 0).sum(-1, dtype=np.float32)
        return reward_PG[: len(by_group)].ravel()

    def _encoded(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[list[int]]:
        """Prompt and completion of each text as tokens of the reward model."""
        rows = [_written(problem, text) for problem, text in zip(problems, texts)]
        policy = self.policy
        names = "the prompt", "the model's max_position_embeddings", "rollout.max_tokens"
        limits = Limits(1, policy.model.max_position - 1, names=names)
        how = {"limits": limits, "now": self.now}
        try:
            found = masks.encode(rows, "example", policy.tokenizer, policy.stop_ids, **how)
            whole = [[*row.prompt_ids, *row.completion_ids] for row in found.examples]
            for ids in whole:
                policy.refuse_unknown(ids, "A completion with its prompt")
        except ValueError as error:
            raise RewardError(f"The reward model {self.path} cannot score: {error}") from error
        return [[int(i) for i in ids] for ids in whole]


def _written(problem: Problem, text: str) -> Written:
    where, prompt = problem.where or "a completion", problem.prompt
    if isinstance(prompt, str):
        return Written(where, None, (prompt + text,))
    reply = {"role": "assistant", "content": text}
    return Written(where, None, ([*prompt, reply],), problem.arguments)


def read(path: str, option: str = _OPTION) -> Policy:
    """The reward model of a folder or hub id; ValueError for one without a score of its own."""
    given, adapter = folder_lib.as_given(path, option), lora.adapter_at(path, option)
    try:
        found = policy_lib.read(*lora.base_at(path, option, adapter), head="scalar")
    except ValueError as error:
        if "model_type" not in str(error):
            raise
        raise ValueError(
            f"{error} An encoder that classifies texts, such as BERT, runs in the reward "
            f'processes: "classifier:{path}#LABEL".'
        ) from error
    if found.has_new_head and (adapter is None or not peft.has_head(adapter)):
        what = "a language model" if adapter is None else "an adapter of a language model"
        raise ValueError(
            f"{given} is {what}: a reward model has a head with one score (config.json: "
            "ForSequenceClassification; of an adapter modules_to_save), and a new one would give "
            "random rewards. Train one with python -m grpo_jax.reward_model, and give its export."
        )
    if adapter is None:
        return found
    return dataclasses.replace(found, model=_adapted(found.model, adapter, option))


def _adapted(model: ModelConfig, adapter: Path, option: str) -> ModelConfig:
    spec = peft.read_config(adapter, option, head="scalar")
    return dataclasses.replace(model, lora=targets.lora_of(model, spec))


def load(
    path: str,
    mesh: Mesh,
    dtype: Any,
    now: datetime,
    *,
    attention: str = "auto",
    option: str = _OPTION,
) -> RewardModel:
    """The reward model of a folder or hub id, its weights on the devices in `dtype`.

    Its head stays float32. `attention`: as `model.attention`. Raises ValueError as `read`.
    """
    policy, dtype = read(path, option), jnp.dtype(dtype)
    model, adapter = policy.model, lora.adapter_at(path, option)

    def keep(where: Any, x: Any) -> Any:
        return x.astype(_dtype_of(where, dtype))

    if adapter is None:
        params = policy_lib.load_params(policy, mesh, 0, jnp.float32, keep)
    else:
        frozen = lora.frozen_params(policy, mesh, dtype)
        trained = lora.given_params(adapter, policy, mesh, 0, jnp.float32)
        params = lora.attached(frozen, trained, model, mesh)
    return RewardModel(path, policy, mesh, params, _values(model, mesh, dtype, attention), now)


def _dtype_of(where: Any, dtype: Any) -> Any:
    """The dtype of a parameter at a place of the tree, in a model of `dtype`."""
    return jnp.float32 if where[0].key == "score" else dtype


def _values(model: ModelConfig, mesh: Mesh, dtype: Any, attention: str) -> Values:
    kernels = choice.choose(attention, model, mesh, dtype)
    return scalars.make_values(Scorer(model, mesh, Sampling(), dtype, kernels=kernels))


@dataclasses.dataclass(frozen=True)
class Planned:
    """A reward model of a plan: shapes alone."""

    params: Params  # shapes with their shardings
    values: Values


def planned(config: ConfigDict, mesh: Mesh) -> dict[str, Planned]:
    """The reward models of a config by name, on a mesh whose devices need not be there.

    Reads their config.json; ValueError, naming the option, where there is none.
    """
    found, dtype = {}, jnp.dtype(config.model.dtype)
    for reward in (r for r in registry.named(config.rewards.names) if r.model):
        adapter = lora.adapter_at(reward.model, _OPTION)
        base = lora.base_at(reward.model, _OPTION, adapter)
        model = folder_lib.read_config(policy_lib.find(*base), folder_lib.as_given(*base))
        model = dataclasses.replace(model, head="scalar")
        model = model if adapter is None else _adapted(model, adapter, _OPTION)
        values = _values(model, mesh, dtype, config.model.attention)
        found[reward.name] = Planned(_params_like(model, mesh, dtype), values)
    return found


def _params_like(model: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Shapes and shardings of a reward model's weights."""
    if model.lora is not None:
        frozen = lora.frozen_like(model, mesh, dtype)
        return lora.attached_like(frozen, policy_lib.trained_like(model, mesh), model, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda where, x: jax.ShapeDtypeStruct(
            x.shape, _dtype_of(where, dtype), sharding=x.sharding
        ),
        policy_lib.param_like(model, mesh),
    )


@dataclasses.dataclass(frozen=True)
class RewardModels:
    """The reward models of a config by name, as `pool.Models`."""

    by_name: dict[str, RewardModel]

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str], group: int
    ) -> dict[str, np.ndarray]:
        return {n: m.of_problems(problems, texts, group) for n, m in self.by_name.items()}

    @property
    def sizes(self) -> dict[str, CompiledSizes]:
        """The packed row sizes of their programs, by program."""
        return {f"reward {name}": model.values.sizes for name, model in self.by_name.items()}


def load_all(
    config: ConfigDict, rewards: Sequence[Reward], mesh: Mesh | None, now: datetime
) -> RewardModels | None:
    """The reward models among the config's rewards; None if there are none.

    `mesh`: None for that of the config.
    """
    named = [reward for reward in rewards if reward.model]
    if not named:
        return None
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    how = mesh, config.model.dtype, now
    attention = config.model.attention
    return RewardModels({r.name: load(r.model, *how, attention=attention) for r in named})
