"""The ratio of policies and the surrogate of the policy gradient: one loss for each token.

Arrays are of one shape, log-probabilities in nats. On-policy (all ratios 1) every surrogate has the
gradient of -A log π: they differ in what they do with tokens that have become likelier or less
likely since the rollout.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from grpo_jax.algorithm.objective import Objective, TokenTerms
from grpo_jax.structs import Array


def log_ratio(logp: Array, old_logp: Array | None) -> Array:
    """Log of the importance ratio to the policy that the rollout's updates started from.

    Without `old_logp` the old policy is the current one: the ratio is exactly 1 and its gradient
    that of log π.
    """
    return logp - old(logp, old_logp)


def old(logp: Array, old_logp: Array | None) -> Array:
    """The log-probability before the rollout's updates; of the first one it is the current one."""
    return jax.lax.stop_gradient(logp) if old_logp is None else old_logp


# The largest log-ratio that is exponentiated, in nats: exp(89) is beyond float32, and one such
# token would make loss or gradient infinite, or with 0 no number, and so refuse the whole update. A
# token beyond counts as exp(20), and `losses.token_loss` takes its gradient away. So does verl,
# which clips both log-ratios (Sheng et al. 2024, arXiv:2409.19256, `core_algos.py`).
MOST = 20.0


def at_most(log_ratio: Array) -> Array:
    """The log-ratio, 20 nats where it is above that; its gradient is 1 there too.

    A `minimum` in the middle of a gradient would round what is not cut otherwise than without it.
    """
    return log_ratio - jax.lax.stop_gradient(jnp.maximum(log_ratio - MOST, 0.0))


def mean_of_completion(x: Array, action: Array) -> Array:
    """Mean over the action tokens of each completion, the last axis, [..., 1]; 0 of none."""
    count = jnp.maximum(action.sum(axis=-1, keepdims=True), 1)
    return jnp.where(action, x, 0.0).sum(axis=-1, keepdims=True) / count


def clipped_surrogate(
    log_ratio: Array,
    advantage: Array,
    low: float,
    high: float,
    dual_clip_ratio: float = 0.0,
    dual_clip_loss: float = 0.0,
) -> Array:
    """Loss of each token, -min(ρA, clip(ρ, 1 - low, 1 + high)A).

    Shao et al. 2024, arXiv:2402.03300, equation 3; a `high` above `low` is the clip-higher of DAPO
    (Yu et al. 2025, arXiv:2503.14476, section 3.1). Log-ratios above 20 nats count as 20.

    Two bounds for tokens with A < 0, whose loss grows with ρ; 0 is no bound. `dual_clip_ratio`: the
    first ρ is at most this, for both signs (INTELLECT-2, arXiv:2505.07291, equation 2; TRL's
    `delta`). `dual_clip_loss`: the loss is at most this times -A (Ye et al. 2019,
    arXiv:1912.09729, equation 5; verl's `clip_ratio_c`).
    """
    ratio = jnp.exp(at_most(log_ratio))
    unclipped = jnp.minimum(ratio, dual_clip_ratio) if dual_clip_ratio else ratio
    loss = -jnp.minimum(unclipped * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    if dual_clip_loss:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip_loss * advantage), loss)
    return loss


def geometric_surrogate(
    log_ratio: Array, advantage: Array, action: Array, low: float, high: float
) -> Array:
    """Loss of each completion at its tokens, -A times the geometric mean of the clipped ratios.

    GMPO (Zhao et al. 2025, arXiv:2507.20673, equation 4): a log-ratio is at most `high` where
    A > 0 and at least -`low` where A < 0; the other side is free.
    """
    clipped = jnp.where(advantage < 0, jnp.maximum(log_ratio, -low), jnp.minimum(log_ratio, high))
    mean = mean_of_completion(clipped, action)
    return -advantage * jnp.exp(at_most(mean)) + jnp.zeros_like(log_ratio)


def cispo(log_ratio: Array, advantage: Array, logp: Array, cap: float) -> Array:
    """Loss of each token, -min(ρ, cap) A log π, where the ratio has no gradient.

    MiniMax-M1, arXiv:2506.13585, equation 4, without its lower clip, as there; ScaleRL
    (arXiv:2510.13786) has a cap of 5. No token loses its gradient.
    """
    ratio = jax.lax.stop_gradient(jnp.minimum(jnp.exp(at_most(log_ratio)), cap))
    return -ratio * advantage * logp


def sapo(log_ratio: Array, advantage: Array, positive: float, negative: float) -> Array:
    """Loss of each token, -(4 / τ) sigmoid(τ(ρ - 1)) A, with τ by the sign of the advantage.

    Soft adaptive policy optimization (Gao et al. 2025, arXiv:2511.20347, equations 5 and 6).
    """
    temperature = jnp.where(advantage > 0, positive, negative)
    ratio = jnp.exp(at_most(log_ratio))
    return -jax.nn.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage


_LEAST_WEIGHT = math.log(1e-8)


def vespo(objective: Objective, logp: Array, terms: TokenTerms, correction: Array) -> Array:
    """Loss of each token, -φ(w) A log π with φ(w) = exp(λ) w^k exp(-λ w), fixed.

    w is the ratio of the whole completion, the product of its tokens' and of their weights
    `correction` for the sampler; (k, λ) by the sign of the advantage (VESPO, arXiv:2602.10693).
    Log-ratios are held within 20 nats a token, log w between log 1e-8 and 20.
    """
    logp_now = jax.lax.stop_gradient(logp)
    of_token = jnp.clip(logp_now - old(logp_now, terms.old_logp), -MOST, MOST)
    of_token += jnp.clip(jnp.log(correction), _LEAST_WEIGHT, MOST)
    log_weight = jnp.where(terms.action, of_token, 0.0).sum(axis=-1, keepdims=True)
    log_weight = jnp.clip(log_weight, _LEAST_WEIGHT, MOST)
    is_negative = terms.advantage < 0
    (k, lamda), (k_neg, lamda_neg) = objective.vespo_positive, objective.vespo_negative
    power = jnp.where(is_negative, k_neg, k)
    decay = jnp.maximum(jnp.where(is_negative, lamda_neg, lamda), 1e-4)
    phi = jnp.exp(decay + power * log_weight - decay * jnp.exp(log_weight))
    return -phi * terms.advantage * logp


def _beyond(change: Array, advantage: Array, threshold: float) -> Array:
    """True where a change exceeds the threshold in the direction of the advantage."""
    return jnp.where(advantage > 0, change > threshold, (change < -threshold) & (advantage < 0))


def is_masked(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """True for tokens whose gradient a surrogate with a mask takes away.

    "tv_mask": probability minus old probability is beyond the threshold in the direction of the
    advantage (DPPO-TV, arXiv:2602.04879). "kl_mask": it moved in that direction, and the KL of the
    two binary distributions (this token, any other) is above it (DPPO-KL, the same).
    "sampler_mask": it differs from the sampler's by more, in either direction (prime-rl's IPO,
    after Kimi K2.5, arXiv:2602.02276).
    """
    logp = jax.lax.stop_gradient(logp)
    if objective.surrogate == "sampler_mask":
        difference = jnp.exp(logp) - jnp.exp(terms.sampler_logp)
        return jnp.abs(difference) > objective.mask_threshold
    before = old(logp, terms.old_logp)
    change = jnp.exp(logp) - jnp.exp(before)
    if objective.surrogate == "tv_mask":
        return _beyond(change, terms.advantage, objective.mask_threshold)
    other = lambda x: jnp.maximum(-jnp.expm1(x), jnp.finfo(logp.dtype).tiny)  # noqa: E731  1 - p
    kl = jnp.exp(before) * (before - logp)
    kl += other(before) * (jnp.log(other(before)) - jnp.log(other(logp)))
    return _beyond(change, terms.advantage, 0.0) & (kl > objective.mask_threshold)


def masked(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """Loss of each token under a mask (`is_masked`), 0 where it is masked.

    -min(ρ, 20) A log π with a fixed ratio; of "sampler_mask" -ρA, where ρ is the ratio to the
    sampler and has a gradient.
    """
    if objective.surrogate == "sampler_mask":
        loss = -jnp.exp(at_most(logp - terms.sampler_logp)) * terms.advantage
    else:
        change = log_ratio(jax.lax.stop_gradient(logp), terms.old_logp)
        loss = -jnp.minimum(jnp.exp(at_most(change)), 20.0) * terms.advantage * logp
    return jnp.where(is_masked(objective, logp, terms), 0.0, loss)


def ratio_of(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """The log-ratio that the surrogate reads, at each token.

    "sequence": the mean over its completion (GSPO, Zheng et al. 2025, arXiv:2507.18071, equation
    7). Others: the token's own.
    """
    change = log_ratio(logp, terms.old_logp)
    if objective.ratio != "sequence":
        return change
    return mean_of_completion(change, terms.action) + jnp.zeros_like(change)


def surrogate(objective: Objective, logp: Array, terms: TokenTerms, correction: Array) -> Array:
    """Loss of each token by the objective's surrogate; `correction` is read by "vespo" alone."""
    advantage = terms.advantage
    if objective.surrogate == "reinforce":  # Williams 1992; GPG, arXiv:2504.02546
        return -advantage * logp
    if objective.surrogate == "vespo":
        return vespo(objective, logp, terms, correction)
    if objective.surrogate.endswith("_mask"):
        return masked(objective, logp, terms)
    change = ratio_of(objective, logp, terms)
    if objective.surrogate == "cispo":
        return cispo(change, advantage, logp, objective.ratio_cap)
    if objective.surrogate == "sapo":
        return sapo(change, advantage, objective.sapo_positive, objective.sapo_negative)
    bounds = objective.clip_low, objective.clip_high
    if objective.ratio == "geometric":
        return geometric_surrogate(change, advantage, terms.action, *bounds)
    dual = objective.dual_clip_ratio, objective.dual_clip_loss
    return clipped_surrogate(change, advantage, *bounds, *dual)
