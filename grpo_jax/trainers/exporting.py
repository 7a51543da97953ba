"""The trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from grpo_jax.devices import transfer
from grpo_jax.learner import optim
from grpo_jax.messages.console import say
from grpo_jax.models.hf import export as export_lib
from grpo_jax.models.policy import Policy
from grpo_jax.structs import Params, TrainState


def export(policy: Policy, folder: Path, state: TrainState, asked_dtype: str) -> None:
    """Writes the policy as it was trained, as `write` does."""
    params = transfer.to_device_memory(optim.trained(state.params, state.opt_state))
    write(policy, folder, params, asked_dtype)


def write(policy: Policy, folder: Path, params: Params, asked_dtype: str) -> None:
    """Writes the policy as a Hugging Face folder; tells where that rounds its weights.

    `asked_dtype`: "auto" or a name, as in `checkpoint.export_dtype`. Every process must call this.
    """
    trained = jax.tree.leaves(params)[0].dtype
    dtype = asked_dtype
    if dtype == "auto":
        dtype = jnp.promote_types(policy.stored or trained, trained).name
    if jnp.promote_types(dtype, trained) != dtype:
        say(
            f"warning: {folder} holds the weights rounded from {trained.name} to {dtype}, as "
            "checkpoint.export_dtype asks for. Small changes of this training are lost in it; "
            '"auto" keeps all.'
        )
    export_lib.save(
        folder,
        params,
        policy.model,
        source=policy.kept or policy.source,
        dtype=dtype,
        tokenizer=policy.tokenizer,
    )
