"""The critic of a config: its model, its updates, and where it begins (PPO)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.algorithm.gae import GAE
from grpo_jax.algorithm.scalar_losses import ValueLoss
from grpo_jax.learner import actor_critic, optim, train_state, update
from grpo_jax.learner.scalars import Values, make_values
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.policy import Policy
from grpo_jax.structs import ActorCritic, ModelConfig, TrainState

KEPT = "source_critic"  # in a run's folder: the config and tokenizer of its critic's model


@dataclasses.dataclass(frozen=True)
class Critic:
    """The programs of a critic."""

    model: ModelConfig
    optimizer: optax.GradientTransformation
    values: Values
    update: update.Update
    gae: GAE


def shape(config: ConfigDict, model: ModelConfig) -> ModelConfig | None:
    """The shape of the critic of a policy of this shape; None: the config has no critic."""
    if not config.algorithm.critic:
        return None
    path = config.critic.path
    if path:
        found = folder_lib.resolve(path, "critic.path")
        longest = model.longest or model.max_position
        model = folder_lib.read_config(found, folder_lib.as_given(path, "critic.path"))
        model = model.within(longest)
    return dataclasses.replace(model, head="scalar", lora=None)


def read(config: ConfigDict, policy: Policy, kept: Path | None = None) -> Policy | None:
    """The model that the critic begins with, checked; its weights are not read yet.

    `kept`: the run's copy of the critic's config and tokenizer. None: the config has no critic.
    Raises ValueError if it reads other tokens than the policy.
    """
    if not config.algorithm.critic:
        return None
    if config.critic.path:
        critic = policy_lib.read(config.critic.path, "critic.path", kept, head="scalar")
        given = folder_lib.as_given(config.critic.path, "critic.path")
    else:
        model = dataclasses.replace(policy.model, head="scalar", lora=None)
        critic = dataclasses.replace(policy, model=model, has_new_head=True)
        given = folder_lib.as_given(config.model.path)
    if critic.model.codes:
        raise ValueError(
            f"{given} has its kernels in NF4 (bitsandbytes), and a critic trains all of its "
            "weights. Set critic.path to a model with whole ones."
        )
    if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(
            f"{given} has another tokenizer than the policy ({len(critic.tokenizer)} tokens, "
            f"there {len(policy.tokenizer)}), and a critic reads the policy's tokens. Take a model "
            'of the same family, or critic.path = "".'
        )
    longest = policy.model.longest or policy.model.max_position
    if critic.model.max_position < min(longest, policy.model.max_position):
        raise ValueError(
            f"{given} takes rows of {critic.model.max_position} tokens, and the policy "
            f"{policy.model.max_position}. Take another critic.path."
        )
    return critic.within(longest)


def schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate of the critic's updates."""
    return optim.schedule(
        config.critic.learning_rate,
        warmup_steps=config.critic.warmup_steps,
        kind="constant",
        num_updates=1,
        end_fraction=0.0,
    )


def make(config: ConfigDict, scorer: Scorer, optimizer: optax.GradientTransformation) -> Critic:
    """The programs of a critic; `scorer` is of its model."""
    algorithm, asked = config.algorithm, config.critic
    return Critic(
        scorer.model,
        optimizer,
        make_values(scorer),
        update.make_update(
            scorer,
            ValueLoss(asked.clip, asked.loss_coef),
            optimizer,
            num_minibatches=config.batch.minibatches,
            offload=config.optim.offload,
        ),
        GAE(
            algorithm.discount,
            algorithm.gae_lambda,
            asked.gae_lambda,
            algorithm.gae_length_scale,
        ),
    )


@dataclasses.dataclass(frozen=True)
class States:
    """Makes the states of a run's critic, and joins them with the policy's."""

    policy: Policy  # the model that the critic begins with
    mesh: Mesh
    optimizer: optax.GradientTransformation
    seed: int
    dtype: Any  # of the parameters

    def first(self, state: TrainState) -> ActorCritic:
        """The state of a policy with the critic before its first update, its weights read."""
        params = policy_lib.load_params(self.policy, self.mesh, self.seed, self.dtype)
        own = train_state.start(params, self.policy.model, self.mesh, self.optimizer)
        return actor_critic.together(state, own)

    def like(self, state: TrainState) -> ActorCritic:
        """The same without arrays."""
        own = train_state.state_like(self.policy.model, self.mesh, self.optimizer, self.dtype)
        return actor_critic.together(state, own)


def states(config: ConfigDict, policy: Policy | None, mesh: Mesh, critic: Critic) -> States | None:
    """`States` of a config, from the model of `read`; None: the config has no critic."""
    if policy is None:
        return None
    dtype = jnp.dtype(config.model.param_dtype)
    return States(policy, mesh, critic.optimizer, config.seed, dtype)
