"""Gradients summed over microbatches, and one step of the optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.devices import by_shard, compiling, sharding
from grpo_jax.kernels.primitives import nth, where
from grpo_jax.learner import train_state
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import lora, parameters
from grpo_jax.models.lora import Weights
from grpo_jax.structs import Array, Params, TrainState


def through(number: Array, step: Callable, carry: Any, microbatches_1: tuple[Array, ...]) -> Any:
    """The carry after `step(carry, *microbatch)` on the first `number` microbatches of a shard.

    `number` is traced, so updates with more or fewer microbatches share one program.
    """

    def one(n: Array, carry: Any) -> Any:
        return step(carry, *(nth(jax.lax.squeeze(x, (0,)), n) for x in microbatches_1))

    return jax.lax.fori_loop(0, number, one, carry)


# Gradient sums in float32, metric sums, metric maxima. A microbatch program sees those of one data
# shard; between programs they are [shards, ...]. Shards are summed once, at the end of an update.
Carry = tuple[Params, dict, dict]


def add_gradient(loss_sums, weights: Weights, carry: Carry, *part: Any) -> Carry:
    """The carry after one more microbatch.

    `loss_sums(weights, *part) -> (total, (sums, maxima))`; frozen weights have no gradient.
    """
    grads, sums, maxima = carry
    of_trained = lambda trained: loss_sums(weights.replace(trained=trained), *part)  # noqa: E731
    (_, (new_sums, new_maxima)), new_grads = jax.value_and_grad(of_trained, has_aux=True)(
        weights.trained
    )
    grads = jax.tree.map(lambda g, n: g + n.astype(jnp.float32), grads, new_grads)
    sums = jax.tree.map(jnp.add, sums, new_sums)
    return grads, sums, jax.tree.map(jnp.maximum, maxima, new_maxima)


def reduce_shards(scorer: Scorer, carry: Carry) -> Carry:
    """The carries [shards, ...] of all data shards as one; gradients are sharded like moments."""
    grads, sums, maxima = carry
    grads, sums = jax.tree.map(lambda x: x.sum(0), (grads, sums))
    grads = jax.lax.with_sharding_constraint(
        grads, train_state.zero1_shardings(scorer.model, scorer.mesh)
    )
    return grads, sums, jax.tree.map(lambda x: x.max(0), maxima)


def make_accumulate(
    scorer: Scorer, through: Callable[..., Carry], *, sums: Iterable[str], maxima: Iterable[str]
) -> tuple[Callable[[], Carry], Callable[..., Carry]]:
    """Two programs: `zero_gradient() -> carry`, `gradient(weights, number, carry, *rows) -> carry`.

    `through(weights, number, carry, *rows)` adds one data shard's rows to its carry; its metrics
    have the names `sums` and `maxima`. `number` is the same for all shards. `gradient` donates its
    carry.
    """
    mesh, like = scorer.mesh, lora.trained_shapes(scorer.model)
    shards = mesh.shape["data"]
    stacked = functools.partial(sharding.stacked, mesh)
    placed = train_state.param_shardings(scorer.model, mesh)
    scalar = stacked(sharding.replicated(mesh))
    shardings = (jax.tree.map(stacked, placed), *(dict.fromkeys(n, scalar) for n in (sums, maxima)))

    @functools.partial(jax.jit, out_shardings=shardings)
    def zero_gradient() -> Carry:
        grads = jax.tree.map(lambda x: jnp.zeros((shards, *x.shape), jnp.float32), like)
        return grads, *({name: jnp.zeros(shards) for name in names} for names in (sums, maxima))

    @jax.named_scope("update")
    def gradient(weights: Weights, number: Array, carry: Carry, *rows: Any) -> Carry:
        cast = functools.partial(parameters.cast_layers, dtype=scorer.dtype)
        frozen = None if weights.frozen is None else cast(weights.frozen)
        weights = weights.replace(trained=cast(weights.trained), frozen=frozen)
        own = jax.tree.map(lambda x: jax.lax.squeeze(x, (0,)), carry)
        carry = through(weights, number, own, *rows)
        return jax.tree.map(lambda x: jax.lax.expand_dims(x, (0,)), carry)

    gradient = jax.jit(
        by_shard.by_data_shard(mesh, compiling.exact(scorer.dtype, gradient), 2),
        donate_argnums=2,
        out_shardings=shardings,
        compiler_options=compiling.options(scorer.mesh),
    )
    return zero_gradient, gradient


@jax.named_scope("optimizer")
def apply_gradient(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    grads: Params,
    loss: Array,
    wanted: Array | bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one optimizer step, or unchanged but for its counters.

    If the loss or gradient is not finite, or `wanted` is False, parameters and optimizer state do
    not change and `num_skipped` grows by 1.
    """
    grad_norm = optax.tree.norm(grads)
    accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & wanted
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: where(accepted, n, o), new, old)  # noqa: E731
    state = TrainState(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        num_updates=state.num_updates + 1,
        num_skipped=state.num_skipped + ~accepted,
    )
    return state, {"policy/grad_norm": grad_norm, "skipped": ~accepted}
