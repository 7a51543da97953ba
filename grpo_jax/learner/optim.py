"""Learning-rate schedule and optimizer, from optax, and their low-precision variants."""

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

    Refused updates do not count, here or in the optimizer: the next update has the rate that the
    refused one would have had, as in Hugging Face's trainer. With n refused updates, the run ends n
    updates before the decay's end.
    """
    decay_steps = max(num_updates - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * end_fraction, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=end_fraction),
    }[kind]()
    if not warmup_steps:
        return after
    # The first update has 1 / warmup_steps of the peak, not 0.
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

    `kept`: how moments are stored, "float32", "bfloat16" or "int8" (`learner/low_precision.py`);
    the latter two are rounded stochastically from `seed`.
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
    """`inner` for bfloat16 parameters, which are rounded stochastically without bias.

    Rounding to the nearest would lose an update below half of the parameter's last bit, which is
    0.2 to 0.4 % of it. The random bits follow from `seed` and the update count. Each returned
    update is the difference of two bfloat16 numbers.
    """

    def init(params: Params) -> RoundedState:
        # optax stores moments in the dtype of its inputs; bfloat16 moments would not change.
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
    """`inner` on a float32 copy; the bfloat16 parameters are the copy rounded to the nearest."""

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
    """The optimizer adapted to the dtype of the parameters; unchanged for "float32"."""
    if dtype == "float32":
        return optimizer
    return (
        with_master_weights(optimizer) if master_weights else stochastic_rounding(optimizer, seed)
    )


def _in_float32(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def trained(params: Params, state: optax.OptState) -> Params:
    """The parameters at full precision: the float32 copy if there is one, else `params`."""
    return state.params if isinstance(state, CopyState) else params


_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


def _is_matrix(params: Params) -> Params:
    """True for weights with weight decay: kernels and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)
