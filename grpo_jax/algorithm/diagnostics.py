"""What explains an update: means over action tokens, and maxima over them."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.algorithm import kl, losses, surrogates
from grpo_jax.algorithm.objective import Objective, TokenTerms
from grpo_jax.structs import Array

_SUMS = (
    "policy/entropy",
    "policy/kl",
    "policy/clip_low_share",
    "policy/clip_high_share",
    "policy/drift_mean",
    "policy/sampler_gap_mean",
    "policy/importance_mean",
    "policy/importance_capped_share",
)
_MASKED = "policy/off_policy_share"
MAXIMA = ("policy/ratio_max", "policy/drift_max", "policy/sampler_gap_max")


def sums(objective: Objective) -> tuple[str, ...]:
    """The names of the sums that `diagnostics` gives."""
    return (*_SUMS, _MASKED) if objective.max_sequence_drift else _SUMS


def _cut(objective: Objective, logp: Array, terms: TokenTerms, ratio: Array) -> tuple[Array, Array]:
    """True where the surrogate bounds a ratio that fell (A < 0), and one that rose (A > 0).

    Those of a clip or a mask have no gradient; a ratio above the cap of "cispo" counts as the cap.
    """
    surrogate, advantage = objective.surrogate, terms.advantage
    if surrogate.endswith("_mask"):
        closed = surrogates.is_masked(objective, logp, terms)
        return closed & (advantage < 0), closed & (advantage > 0)
    if surrogate == "cispo":
        return jnp.zeros(ratio.shape, bool), ratio > objective.ratio_cap
    if surrogate != "clip":
        return jnp.zeros(ratio.shape, bool), jnp.zeros(ratio.shape, bool)
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.ratio == "geometric":
        low, high = jnp.exp(-objective.clip_low), jnp.exp(objective.clip_high)
    return (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)


def diagnostics(
    objective: Objective,
    logp: Array,
    entropy: Array,
    terms: TokenTerms,
    action: Array,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums over action tokens, and maxima over them; all scalars.

    The drift is what updates on this rollout have changed; the sampler's gap is none of that, but
    what scorer and sampler made of the same policy, or of one a step older. `policy/kl` is k3.
    """
    kept = action.astype(jnp.float32)
    change = surrogates.log_ratio(logp, terms.old_logp)
    ratio = jnp.exp(surrogates.at_most(surrogates.ratio_of(objective, logp, terms)))
    low, high = _cut(objective, logp, terms, ratio)
    drift = jnp.abs(change)
    gap = jnp.abs(surrogates.old(logp, terms.old_logp) - terms.sampler_logp)
    divergence = jnp.zeros_like(logp) if terms.ref_logp is None else kl.k3(logp, terms.ref_logp)
    weight, capped = losses.importance(objective, logp, terms), jnp.zeros_like(logp)
    if objective.importance_level != "none":
        log_weight = losses.sampler_log_ratio(objective, logp, terms)
        capped = log_weight > jnp.log(objective.importance_cap)
        if objective.importance_floor:
            capped |= log_weight < jnp.log(objective.importance_floor)
    values = [entropy, divergence, low, high, drift, gap, weight, capped]
    if objective.max_sequence_drift:
        values.append(losses.is_off_policy(objective, logp, terms) & jnp.ones_like(action))
    total = [jnp.sum(jnp.where(action, value, 0) * kept) for value in values]
    maxima = [jnp.max(jnp.where(action, value, 0)) for value in (ratio, drift, gap)]
    return dict(zip(sums(objective), total)), dict(zip(MAXIMA, maxima))
