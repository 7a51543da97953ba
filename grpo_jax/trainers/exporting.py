"""Exports the trained policy as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from grpo_jax.devices import transfer
from grpo_jax.learner import optim
from grpo_jax.messages.console import say
from grpo_jax.models import lora
from grpo_jax.models.hf import export as export_lib
from grpo_jax.models.hf import peft
from grpo_jax.models.policy import Policy
from grpo_jax.setup import lora as lora_setup
from grpo_jax.structs import Params, TrainState

ADAPTER = "adapter"  # adapters, inside an export
CRITIC = "critic"  # those of a critic with its head


def export(
    policy: Policy,
    folder: Path,
    state: TrainState,
    asked_dtype: str,
    frozen: Params | None = None,
) -> None:
    """Exports a train state's policy, from its float32 copy if there is one; see `write`."""
    params = transfer.to_device_memory(optim.trained(state.params, state.opt_state))
    write(policy, folder, params, asked_dtype, frozen)


def write(
    policy: Policy, folder: Path, params: Params, asked_dtype: str, frozen: Params | None = None
) -> None:
    """Writes the policy as a Hugging Face folder; says so if that rounds its weights.

    Adapters are merged into the `frozen` weights, and also written to a PEFT folder inside it.
    `asked_dtype`: "auto" or a name, as in `checkpoint.export_dtype`. Every process must call this.
    """
    if policy.model.lora is None:
        return _write(policy, folder, params, _dtype(policy, folder, params, asked_dtype))
    model, mesh = policy.model, jax.tree.leaves(params)[0].sharding.mesh
    if model.lora.base != "auto":  # merge into the source's weights, not into their codes
        plain = dataclasses.replace(model, lora=dataclasses.replace(model.lora, base="auto"))
        of_source = dataclasses.replace(policy, model=plain)
        frozen = lora_setup.frozen_params(of_source, mesh, jnp.dtype(policy.stored or "float32"))
    dtype = asked_dtype
    if dtype == "auto":
        dtype = policy.stored or jax.tree.leaves(frozen)[0].dtype.name
    merged = lora.merged(lora.attached(frozen, params, model), dtype)
    _write(policy, folder, merged, dtype)
    peft.save(folder / ADAPTER, params, model, base=source_name(policy))


def export_critic(critic: Policy, folder: Path, state: TrainState) -> None:
    """Writes a critic's adapters and head to a PEFT folder inside an export; nothing without them.

    `critic.path` and `rewards.names` take that folder. Every process must call this.
    """
    if critic.model.lora is not None:
        params = transfer.to_device_memory(optim.trained(state.params, state.opt_state))
        peft.save(folder / CRITIC, params, critic.model, base=source_name(critic))


def _dtype(policy: Policy, folder: Path, params: Params, asked: str) -> str:
    """The dtype of an export; says so if it rounds the parameters."""
    trained, dtype = jax.tree.leaves(params)[0].dtype, asked
    if dtype == "auto":
        dtype = jnp.promote_types(policy.stored or trained, trained).name
    if jnp.promote_types(dtype, trained) != dtype:
        say(
            f"warning: {folder} holds the weights rounded from {trained.name} to {dtype}, as "
            "checkpoint.export_dtype asks for. Small changes of this training are lost in it; "
            '"auto" keeps all.'
        )
    return dtype


def _write(policy: Policy, folder: Path, params: Params, dtype: str) -> None:
    export_lib.save(
        folder,
        params,
        policy.model,
        source=policy.kept or policy.source,
        dtype=dtype,
        tokenizer=policy.tokenizer,
    )


def source_name(policy: Policy) -> str | None:
    """The hub id of the model that a policy was read from, or its folder; None: a new model."""
    source = policy.source
    if source is None:
        return None
    repository = source.parent.parent.name  # models--OWNER--NAME/snapshots/HASH
    is_cached = source.parent.name == "snapshots" and repository.startswith("models--")
    return "/".join(repository.split("--")[1:]) if is_cached else str(source)
