"""From rewarded rollouts to new parameters: two jitted programs.

`make_prepare` gives what stays fixed for a rollout: advantages, and the log-probabilities of the
reference and of the policy before its first update, each computed only where the loss reads it.
`make_update` gives one optimizer update on a minibatch, its microbatches scanned and their
gradients summed before they are divided once. A group is never split.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.algorithm import advantages, logprobs, losses
from grpo_jax.models import transformer
from grpo_jax.structs import (
    Array,
    Experience,
    ModelConfig,
    Params,
    Rollouts,
    Sampling,
    TrainState,
)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How the policy's network is run over given completions."""

    model: ModelConfig
    mesh: Mesh
    sampling: Sampling
    dtype: Any = jnp.float32  # of activations
    unroll: bool = False
    remat: bool = False

    def hidden(self, params: Params, rollouts: Rollouts) -> Array:
        """The hidden state that predicts each completion token, [P * G, C, D]."""
        hidden_PGCD = transformer.score(
            params,
            self.model,
            rollouts.prompt_PQ,
            rollouts.prompt_length_P,
            rollouts.completion_PGC,
            dtype=self.dtype,
            unroll=self.unroll,
            remat=self.remat,
        )
        return hidden_PGCD.reshape(-1, *hidden_PGCD.shape[2:])

    def logp(self, params: Params, rollouts: Rollouts) -> Array:
        """Log-probabilities of the completions, float32 [P, G, C]."""
        completion_PGC = rollouts.completion_PGC
        target_BT = completion_PGC.reshape(-1, completion_PGC.shape[-1])
        head = transformer.head_kernel(params)
        logp_BT, _ = logprobs.score(self.hidden(params, rollouts), head, target_BT, self.sampling)
        return logp_BT.reshape(completion_PGC.shape)


def action_mask(length_PG: Array, stopped_PG: Array, tokens: int, mask_truncated: bool) -> Array:
    """True for tokens the policy chose and is trained on, its stop token included, [P, G, C]."""
    action_PGC = jnp.arange(tokens)[None, None] < length_PG[..., None]
    return action_PGC & stopped_PG[..., None] if mask_truncated else action_PGC


def _microbatches(tree: Any, count: int) -> Any:
    """Arrays [P, ...] as [count, P / count, ...]: part m takes prompts m, m + count, …

    Strided, so that prompts split over devices stay where they are.
    """

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def _unsplit(x: Array) -> Array:
    """The inverse of `_microbatches`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def make_prepare(
    scorer: Scorer, *, by_std: bool, mask_truncated: bool, num_microbatches: int, with_old: bool
):
    """A jitted `(params, ref_params | None, rollouts, reward_PG) -> Experience`.

    `with_old`: the rollout is updated on more than once, so the policy's log-probabilities before
    the first update are computed, by the scorer itself. `ref_params` None: no KL term.
    """

    def logp_of(params: Params, rollouts: Rollouts) -> Array:
        parts = sharding.constrain_rows(scorer.mesh, rollouts)
        parts = _microbatches(parts, num_microbatches)
        logp = jax.lax.map(functools.partial(scorer.logp, params), parts)
        return _unsplit(logp)

    @jax.jit
    def prepare(params, ref_params, rollouts: Rollouts, reward_PG: Array) -> Experience:
        return Experience(
            rollouts=rollouts,
            advantage_PG=advantages.group_advantages(reward_PG, by_std=by_std),
            action_PGC=action_mask(
                rollouts.length_PG,
                rollouts.stopped_PG,
                rollouts.completion_PGC.shape[-1],
                mask_truncated,
            ),
            old_logp_PGC=logp_of(params, rollouts) if with_old else None,
            ref_logp_PGC=None if ref_params is None else logp_of(ref_params, rollouts),
        )

    return prepare


def _loss_sums(params: Params, scorer: Scorer, objective: losses.Objective, part: Experience):
    """Summed loss of one microbatch, and (count, sums, maxima) of what explains it."""
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    rollouts = part.rollouts
    action_BT, target_BT = rows(part.action_PGC), rows(rollouts.completion_PGC)
    advantage_PGC = jnp.broadcast_to(part.advantage_PG[..., None], part.action_PGC.shape)
    terms = {
        "advantage": rows(advantage_PGC),
        "old_logp": None if part.old_logp_PGC is None else rows(part.old_logp_PGC),
        "ref_logp": None if part.ref_logp_PGC is None else rows(part.ref_logp_PGC),
    }
    weight_BT, count = losses.weights(action_BT, objective)
    total, logp_BT, entropy_BT = logprobs.loss(
        functools.partial(losses.token_loss, objective),
        scorer.sampling,
        scorer.hidden(params, rollouts),
        transformer.head_kernel(params),
        target_BT,
        weight_BT,
        terms,
    )
    sums, maxima = losses.diagnostics(
        objective, logp_BT, entropy_BT, terms, action_BT, rows(rollouts.logp_PGC)
    )
    sums |= {"loss": total, "count": count, "tokens": action_BT.sum().astype(jnp.float32)}
    return total, (sums, maxima)


def accumulate(loss_sums, params: Params, parts: Any) -> tuple[Params, dict, dict]:
    """Gradient sum, metric sums and metric maxima over microbatches `parts` [M, ...].

    `loss_sums(params, part) -> (total, (sums, maxima))`. Gradients are summed in float32.
    """

    def one(carry, part):
        grads, sums, maxima = carry
        (_, (new_sums, new_maxima)), new_grads = jax.value_and_grad(loss_sums, has_aux=True)(
            params, part
        )
        grads = jax.tree.map(lambda g, n: g + n.astype(jnp.float32), grads, new_grads)
        sums = jax.tree.map(jnp.add, sums, new_sums)
        return (grads, sums, jax.tree.map(jnp.maximum, maxima, new_maxima)), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, (sums, maxima) = jax.eval_shape(loss_sums, params, first)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)  # noqa: E731
    start = zeros(params), zeros(sums), zeros(maxima)
    return jax.lax.scan(one, start, parts)[0]


def apply_gradient(
    state: TrainState, optimizer: optax.GradientTransformation, grads: Params, loss: Array
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one optimizer step, or unchanged but for its counters.

    A loss or gradient that is not finite leaves parameters and optimizer as they were and counts in
    `num_skipped`.
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    state = TrainState(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        num_updates=state.num_updates + 1,
        num_skipped=state.num_skipped + ~finite,
    )
    return state, {"policy/grad_norm": grad_norm, "skipped": ~finite}


def make_update(
    scorer: Scorer,
    objective: losses.Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_minibatches: int,
    num_microbatches: int,
):
    """A jitted `(state, experience, minibatch index) -> (state, metrics)`; the state is donated.

    Metrics are float32 scalars by their logged names, and `skipped`, True where the update was
    refused.
    """

    like = state_like(scorer.model, scorer.mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, like)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state: TrainState, experience: Experience, index: Array):
        experience = sharding.constrain_rows(scorer.mesh, experience)
        minibatch = jax.tree.map(lambda x: x[index], _microbatches(experience, num_minibatches))
        parts = _microbatches(minibatch, num_microbatches)
        loss_sums = lambda params, part: _loss_sums(params, scorer, objective, part)  # noqa: E731
        grads, sums, maxima = accumulate(loss_sums, state.params, parts)
        count, tokens = jnp.maximum(sums.pop("count"), 1.0), jnp.maximum(sums.pop("tokens"), 1.0)
        loss = sums.pop("loss") / count
        grads = jax.tree.map(lambda g: g / count, grads)
        state, metrics = apply_gradient(state, optimizer, grads, loss)
        metrics |= {name: value / tokens for name, value in sums.items()}
        return state, metrics | maxima | {"policy/loss": loss}

    return update


def _state_shardings(like: TrainState, model: ModelConfig, mesh: Mesh, optimizer) -> TrainState:
    """Where each part of the state lives: the optimizer's moments with their parameters."""
    axes = transformer.logical_axes(model)
    params = sharding.tree_shardings(mesh, axes, like.params)
    whole = sharding.replicated(mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, placed: placed,
        like.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(params, opt_state, whole, whole)


def state_like(
    model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, dtypes and shardings of the train state, without making one."""
    like = jax.eval_shape(
        functools.partial(_init_state, optimizer=optimizer), transformer.param_shapes(model)
    )
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        like,
        _state_shardings(like, model, mesh, optimizer),
    )


def start(
    params: Params, model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first update; `params` are given away."""
    shardings = jax.tree.map(lambda x: x.sharding, state_like(model, mesh, optimizer))
    init = functools.partial(_init_state, optimizer=optimizer)
    return jax.jit(init, donate_argnums=0, out_shardings=shardings)(params)


def _init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
