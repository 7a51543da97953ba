"""Learning-rate schedule and optimizer, both from optax."""

from __future__ import annotations

import jax
import optax

from grpo_jax.structs import Params


def schedule(
    peak: float, *, warmup_steps: int, kind: str, num_updates: int, end_fraction: float
) -> optax.Schedule:
    """Learning rate of each update: linear warm-up, then constant, or a decay to the run's end."""
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
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by global norm; 0 turns clipping off."""
    steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    steps.append(
        optax.adamw(
            learning_rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=_is_matrix
        )
    )
    return optax.chain(*steps)


def _is_matrix(params: Params) -> Params:
    """True for weights that decay: kernels and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
