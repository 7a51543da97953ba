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
from grpo_jax.models import lora
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.hf import peft
from grpo_jax.models.policy import Policy
from grpo_jax.setup import lora as lora_lib
from grpo_jax.structs import ActorCritic, ModelConfig, Params, TrainState

_OPTION = "critic.path"
KEPT = "source_critic"  # in a run's folder: the config and tokenizer of its critic's model
_ADAPTER = "source_critic_adapter"  # there: a copy of the adapter that the critic begins with


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
    path, of_policy, adapter = config.critic.path, model.lora, None
    if path:
        adapter = lora_lib.adapter_at(path, _OPTION)
        base, option = lora_lib.base_at(path, _OPTION, adapter)
        longest = model.longest or model.max_position
        found = folder_lib.resolve(base, option)
        model = folder_lib.read_config(found, folder_lib.as_given(base, option)).within(longest)
    model = dataclasses.replace(model, head="scalar", lora=None)
    return lora_lib.adapted_critic(model, config, of_policy, adapter)


def read(config: ConfigDict, policy: Policy, kept: Path | None = None) -> Policy | None:
    """The model that the critic begins with, checked; its weights are not read yet.

    `kept`: the run's copy of lora.path; that of the critic's config and tokenizer lies beside it.
    None: the config has no critic. Raises ValueError if it reads other tokens than the policy.
    """
    if not config.algorithm.critic:
        return None
    path, adapter = config.critic.path, None
    if path:
        adapter, own = _adapter_at(path, kept), kept and kept.with_name(KEPT)
        critic = policy_lib.read(*lora_lib.base_at(path, _OPTION, adapter), own, head="scalar")
        given = folder_lib.as_given(path, _OPTION)
    else:
        model = dataclasses.replace(policy.model, head="scalar", lora=None)
        critic = dataclasses.replace(policy, model=model, has_new_head=True)
        given = folder_lib.as_given(config.model.path)
    adapted = lora_lib.adapted_critic(critic.model, config, policy.model.lora, adapter, kept)
    _refuse_other_rows(critic, policy, given)
    longest = policy.model.longest or policy.model.max_position
    return dataclasses.replace(critic, model=adapted).within(longest)


def _adapter_at(path: str, kept: Path | None) -> Path | None:
    """The folder of PEFT that a critic begins with, or the run's copy; None: a whole model."""
    try:
        own = kept and kept.with_name(_ADAPTER)
        folder = policy_lib.find(path, _OPTION, own, peft.CONFIG)
    except ValueError:  # gone; the run may have a copy of a whole model's config
        return None
    return folder if peft.is_adapter(folder) else None


def keep(config: ConfigDict, critic: Policy | None, folder: Path) -> Policy | None:
    """The critic, after copying its files to the run's folder: they may be gone at a restart."""
    if critic is None:
        return None
    adapter = _adapter_at(config.critic.path, folder / KEPT) if config.critic.path else None
    if adapter is not None:
        lora_lib.keep_adapter(adapter, folder / _ADAPTER, _OPTION)
    return policy_lib.keep(critic, folder / KEPT)


def _refuse_other_rows(critic: Policy, policy: Policy, given: str) -> None:
    """Raises ValueError for a critic that does not read the policy's tokens, or long rows."""
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


def told(critic: Policy | None) -> list[str]:
    """Describes what of a critic learns, if it has adapters."""
    if critic is None or critic.model.lora is None:
        return []
    number = lora.num_trained(critic.model)
    return [f"Its critic: adapters and a head, {number:,} parameters learn"]


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
    frozen: Params | None = None  # the weights under its adapters; None: all of them learn
    adapter: Path | None = None  # the folder of PEFT that it begins with, if it does

    def first(self, state: TrainState) -> ActorCritic:
        """The state of a policy with the critic before its first update, its weights read."""
        own = train_state.start(self._first_params(), self.policy.model, self.mesh, self.optimizer)
        return actor_critic.together(state, own)

    def _first_params(self) -> Params:
        how = self.policy, self.mesh, self.seed, self.dtype
        if self.policy.model.lora is None:
            return policy_lib.load_params(*how)
        if self.adapter is not None:
            return lora_lib.given_params(self.adapter, *how)
        return lora_lib.new_params(*how, purpose="critic's adapters")

    def like(self, state: TrainState) -> ActorCritic:
        """The same without arrays."""
        own = train_state.state_like(self.policy.model, self.mesh, self.optimizer, self.dtype)
        return actor_critic.together(state, own)

    def weights(self, state: TrainState) -> Params:
        """The weights that the critic's network reads, of its own state."""
        return lora.attached(self.frozen, state.params, self.policy.model)


def states(
    config: ConfigDict,
    critic: Policy,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    frozen: Params | None,
    folder: Path,
) -> States:
    """`States` of a run in `folder`, from the model of `keep`.

    `frozen`: the weights under the policy's adapters. Where the critic's are the same they are
    shared, and otherwise read here.
    """
    path = config.critic.path
    adapter = _adapter_at(path, folder / KEPT) if path else None
    if frozen is not None and _has_base_of(policy, critic):
        own = shared(frozen, critic.model)
    else:
        own = lora_lib.frozen_params(critic, mesh, config.model.dtype)
    dtype = jnp.dtype(config.model.param_dtype)
    return States(critic, mesh, optimizer, config.seed, dtype, own, adapter)


def _has_base_of(policy: Policy, critic: Policy) -> bool:
    """Whether a critic's adapters lie beside the same weights as the policy's."""
    bases = [model.lora and model.lora.base for model in (policy.model, critic.model)]
    return (
        None not in bases
        and bases[0] == bases[1]
        and policy.source is not None
        and policy.source.resolve() == critic.source.resolve()
    )


def frozen_like(
    config: ConfigDict, policy: ModelConfig, critic: ModelConfig, mesh: Mesh, frozen: Params | None
) -> Params | None:
    """Shapes and shardings of the weights under a critic's adapters, of a plan; None: all learn.

    `frozen`: those under the policy's. They are shared where the paths say that they are the same.
    """
    if critic.lora is None:
        return None
    path = config.critic.path
    if path and (adapter := _adapter_at(path, None)) is not None:
        path = peft.base_of(adapter)
    is_same = path in ("", config.model.path) and policy.lora is not None
    if frozen is not None and is_same and policy.lora.base == critic.lora.base:
        return shared(frozen, critic)
    return lora_lib.frozen_like(critic, mesh, jnp.dtype(config.model.dtype))


def shared(frozen: Params, critic: ModelConfig) -> Params:
    """The policy's frozen weights, as those of a critic with the same body: without its head."""
    return {name: frozen[name] for name in lora.frozen_axes(critic)}
