"""Learning-rate schedule and optimizer, from optax; what low precision needs besides."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax import keys
from grpo_jax.learner import low_precision
from grpo_jax.structs import Array, Params


def schedule(
    peak: float, *, warmup_steps: int, kind: str, num_updates: int, end_fraction: float
) -> optax.Schedule:
    """Learning rate of each update: linear warm-up, then constant, or a decay to the run's end.

    Updates that are refused do not count, nor does the optimizer count them: what follows has the
    rate that they would have had, as where Hugging Face's trainer skips one. A decay then ends that
    many updates before its end.
    """
    decay_steps = max(num_updates - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * end_fraction, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=end_fraction),
    }[kind]()
    if not warmup_steps:
        return after
    # The first update already moves: it has 1 / warmup_steps of the peak, not 0.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def adamw(
    learning_rate: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    kept: str = "float32",
    seed: int = 0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by global norm; 0 turns clipping off.

    `kept`: how the moments are, "float32", "bfloat16" or "int8" (`learner/low_precision.py`); the
    latter two are rounded by chance, which follows from `seed`.
    """
    steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if kept == "float32":
        adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps)
    else:
        adam = low_precision.scale_by_adam(beta1=beta1, beta2=beta2, eps=eps, kept=kept, seed=seed)
    return optax.chain(
        *steps,
        optax.chain(
            adam,
            optax.add_decayed_weights(weight_decay, _is_matrix),
            optax.scale_by_learning_rate(learning_rate),
        ),
    )


class RoundedState(NamedTuple):
    count: Array  # int32: updates done
    inner: optax.OptState


def stochastic_rounding(
    inner: optax.GradientTransformation, seed: int
) -> optax.GradientTransformation:
    """`inner` for bfloat16 parameters: each goes up or down by chance, and is right in the mean.

    To the nearest, an update under half of the parameter's last bit, 0.2 to 0.4 % of it, would be
    lost. The chance follows from `seed` and the count of updates. The updates that this gives lead
    from one bfloat16 to another.
    """

    def init(params: Params) -> RoundedState:
        # What optax keeps has the dtype of what it is given; a bfloat16 moment would stand still.
        return RoundedState(jnp.int32(0), inner.init(_in_float32(params)))

    def update(grads: Params, state: RoundedState, params: Params) -> tuple[Params, RoundedState]:
        count = state.count + 1
        updates, inner_state = inner.update(grads, state.inner, params)
        leaves, tree = jax.tree.flatten(params)
        key, changes = keys.key_for(seed, "parameters", count), []
        for old, update in zip(leaves, tree.flatten_up_to(updates)):
            bits = low_precision.random_bits(key, old.shape, after=changes)
            old = old.astype(jnp.float32)
            new = low_precision.to_bfloat16(old + update, bits & 0xFFFF)
            changes.append(new.astype(jnp.float32) - old)
        return tree.unflatten(changes), RoundedState(count, inner_state)

    return optax.GradientTransformation(init, update)


class CopyState(NamedTuple):
    params: Params  # float32
    inner: optax.OptState


def with_master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on a float32 copy of bfloat16 parameters, which are its values to the nearest."""

    def init(params: Params) -> CopyState:
        copy = _in_float32(params)
        return CopyState(copy, inner.init(copy))

    def update(grads: Params, state: CopyState, params: Params) -> tuple[Params, CopyState]:
        updates, inner_state = inner.update(grads, state.inner, state.params)
        copy = optax.apply_updates(state.params, updates)
        changes = jax.tree.map(
            lambda new, old: new.astype(old.dtype).astype(jnp.float32) - old.astype(jnp.float32),
            copy,
            params,
        )
        return changes, CopyState(copy, inner_state)

    return optax.GradientTransformation(init, update)


def for_params(
    optimizer: optax.GradientTransformation, dtype: str, *, master_weights: bool, seed: int
) -> optax.GradientTransformation:
    """The optimizer for parameters of this dtype: itself for "float32"."""
    if dtype == "float32":
        return optimizer
    return (
        with_master_weights(optimizer) if master_weights else stochastic_rounding(optimizer, seed)
    )


def _in_float32(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def trained(params: Params, state: optax.OptState) -> Params:
    """The parameters as exactly as they were trained: of a float32 copy that, else `params`."""
    return state.params if isinstance(state, CopyState) else params


_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


def _is_matrix(params: Params) -> Params:
    """True for weights that decay: kernels and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)
