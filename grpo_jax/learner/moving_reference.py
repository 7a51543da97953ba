"""The reference of the KL term, moved towards the policy from time to time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.learner import train_state
from grpo_jax.structs import Array, ModelConfig, Params


def make_refresh(model: ModelConfig, mesh: Mesh, mix: float) -> Callable[[Params, Params], Params]:
    """The program (policy's, reference's parameters) -> the next reference's; donates the latter.

    `mix` times the policy and 1 - `mix` times the reference, computed in float32 and rounded to the
    reference's dtype (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656: the "soft update", and
    with a mix of 1 the "hard update"; TRL's `sync_ref_model`).
    """

    def mixed(policy: Array, reference: Array) -> Array:
        policy, old = policy.astype(jnp.float32), reference.astype(jnp.float32)
        return (mix * policy + (1 - mix) * old).astype(reference.dtype)

    @functools.partial(
        jax.jit, donate_argnums=1, out_shardings=train_state.param_shardings(model, mesh)
    )
    def refresh_reference(params: Params, reference: Params) -> Params:
        return jax.tree.map(mixed, params, reference)

    return refresh_reference
