"""The objective, as arithmetic on log-probabilities; no model here.

Every function works elementwise on arrays of one shape, float32, log-probabilities in nats. Token
losses are summed with `weights` and divided by their count once, over the global batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.structs import Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The constants of the loss; `config.algorithm` documents each."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    normalizer: str = "token"
    max_tokens: int = 1  # completion limit, the "constant" normalizer's length of every sequence
    importance_level: str = "none"  # or "token" or "sequence"; `config.rollout_correction`
    importance_bound: str = "truncate"  # or "mask"
    importance_cap: float = 2.0
    kl_gradient: str = "reference_policy"

    @property
    def sums_sequences(self) -> bool:
        """Whether the correction needs a whole completion's log-probability before its loss."""
        return self.importance_level == "sequence"


@struct.dataclass
class TokenTerms:
    """What the loss of each token knows besides its log-probability; arrays of one shape."""

    advantage: Array
    sampler_logp: Array
    old_logp: Array | None  # None: one update, so the current
    ref_logp: Array | None  # None: no KL term
    sequence_log_ratio: Array | None  # of its whole completion; None: the loss reads none
    kl_coef: Array | None = None  # None: the objective's
    entropy_coef: Array | None = None  # None: the objective's
    policy_weight: Array | None = None  # of the surrogate, bool or float32; None: 1


def log_ratio(logp: Array, old_logp: Array | None) -> Array:
    """Log of the importance ratio to the policy that the rollout's updates started from.

    Without `old_logp` the old policy is the current one: the ratio is exactly 1 and its gradient
    that of log π.
    """
    return logp - _old(logp, old_logp)


def _old(logp: Array, old_logp: Array | None) -> Array:
    """The log-probability before the rollout's updates; of the first one it is the current one."""
    return jax.lax.stop_gradient(logp) if old_logp is None else old_logp


# The largest log-ratio that is exponentiated, in nats: exp(89) is beyond float32, and one such
# token would make loss or gradient infinite, or with 0 no number, and so refuse the whole update. A
# token beyond counts as exp(20), and `token_loss` takes its gradient away. So does verl, which
# clips both log-ratios (Sheng et al. 2024, arXiv:2409.19256, `core_algos.py`).
_MOST = 20.0


def _at_most(log_ratio: Array) -> Array:
    """The log-ratio, 20 nats where it is above that; its gradient is 1 there too.

    A `minimum` in the middle of a gradient would round what is not cut otherwise than without it.
    """
    return log_ratio - jax.lax.stop_gradient(jnp.maximum(log_ratio - _MOST, 0.0))


def clipped_surrogate(log_ratio: Array, advantage: Array, low: float, high: float) -> Array:
    """Loss of each token, -min(ρA, clip(ρ, 1 - low, 1 + high)A).

    Shao et al. 2024, arXiv:2402.03300, equation 3; a `high` above `low` is the clip-higher of DAPO
    (Yu et al. 2025, arXiv:2503.14476, section 3.1). Log-ratios above 20 nats count as 20.
    """
    ratio = jnp.exp(_at_most(log_ratio))
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def sequence_log_ratio(old_logp_PGC: Array, sampler_logp_PGC: Array, action_PGC: Array) -> Array:
    """Log of the whole completion's probability under the old policy over the sampler's, [P, G]."""
    difference_PGC = jnp.where(action_PGC, old_logp_PGC - sampler_logp_PGC, 0.0)
    return difference_PGC.sum(axis=-1)


def importance(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """Weight of each token for what sampler and scorer make of it differently; no gradient.

    The ratio π_old / π_sampler, of the token or of its whole completion, where π_old is the policy
    that the rollout's updates started from, at the precision they compute in. A ratio above the cap
    is cut to it ("truncate": Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training", equation 4, after Espeholt et al. 2018, arXiv:1802.01561) or taken as 0
    ("mask"). TRL's modes of the same names do the same. The ratio of the clip stays that of policy
    to old policy.
    """
    if objective.importance_level == "none":
        return jnp.ones_like(logp)
    ratio = jnp.exp(_sampler_log_ratio(objective, logp, terms))
    beyond = 0.0 if objective.importance_bound == "mask" else objective.importance_cap
    return jnp.where(ratio > objective.importance_cap, beyond, ratio)


def _sampler_log_ratio(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    if objective.sums_sequences:
        return terms.sequence_log_ratio
    return _old(logp, terms.old_logp) - terms.sampler_logp


def kl_k3(logp: Array, ref_logp: Array) -> Array:
    """Estimate of KL(policy ‖ reference) at each sampled token, never below 0.

    exp(d) - d - 1 with d = ref - policy (Schulman's k3; arXiv:2402.03300, equation 4). Its gradient
    on-policy is on average that of KL(reference ‖ policy), which pulls towards the reference too;
    that of the plain difference (k1) is zero.
    A d above 20 nats counts as 20.
    """
    d = _at_most(ref_logp - logp)
    return jnp.expm1(d) - d


def kl_loss(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """The KL's term of the loss at each token, without its coefficient.

    "reference_policy": k3. "policy_reference": k3 times the ratio to the old policy, whose gradient
    is on average that of KL(policy ‖ reference) (DeepSeek-V3.2, arXiv:2512.02556; TRL's since 1.10,
    `use_bias_correction_kl`). With one update a rollout both have one value, not one gradient.
    """
    kl = kl_k3(logp, terms.ref_logp)
    if objective.kl_gradient == "policy_reference":
        kl *= jnp.exp(_at_most(log_ratio(logp, terms.old_logp)))
    return kl


def token_loss(objective: Objective, logp: Array, entropy: Array, terms: TokenTerms) -> Array:
    """Loss of each token before weighting.

    The importance weighs the surrogate alone, as in TRL: the KL and the
    entropy are of the policy, whoever drew the tokens. A token more than 20 nats likelier than
    under the old policy, or less likely than under the reference of a KL term, has no gradient in
    `logp`.
    """
    far = log_ratio(logp, terms.old_logp) > _MOST
    if objective.kl_coef:
        far |= terms.ref_logp - logp > _MOST
    logp = jnp.where(far, jax.lax.stop_gradient(logp), logp)
    loss = clipped_surrogate(
        log_ratio(logp, terms.old_logp),
        terms.advantage,
        objective.clip_low,
        objective.clip_high,
    )
    if objective.importance_level != "none":
        loss *= importance(objective, logp, terms)
    if terms.policy_weight is not None:
        loss *= terms.policy_weight
    if objective.kl_coef:
        coef = objective.kl_coef if terms.kl_coef is None else terms.kl_coef
        loss += coef * kl_loss(objective, logp, terms)
    if objective.entropy_coef or terms.entropy_coef is not None:
        coef = objective.entropy_coef if terms.entropy_coef is None else terms.entropy_coef
        loss -= coef * entropy
    return loss


def weights(action_BT: Array, objective: Objective) -> tuple[Array, Array]:
    """Weight of each token in the loss sum, float32 [B, T], and what to divide the sum by.

    "token": every token of the batch alike (DAPO); "sequence": every sequence alike, its tokens
    sharing (the GRPO paper); "constant": every token alike, divided by sequences times the
    completion limit, so that length has no influence (Dr. GRPO).
    """
    weight_BT = action_BT.astype(jnp.float32)
    length_B1 = weight_BT.sum(axis=1, keepdims=True)
    if objective.normalizer == "token":
        return weight_BT, weight_BT.sum()
    if objective.normalizer == "sequence":
        return weight_BT / jnp.maximum(length_B1, 1.0), (length_B1 > 0).sum().astype(jnp.float32)
    return weight_BT, jnp.float32(action_BT.shape[0] * objective.max_tokens)


# What `diagnostics` gives: sums over action tokens, and maxima over them.
SUMS = (
    "policy/entropy",
    "policy/kl",
    "policy/clip_low_share",
    "policy/clip_high_share",
    "policy/drift_mean",
    "policy/sampler_gap_mean",
    "policy/importance_mean",
    "policy/importance_capped_share",
)
MAXIMA = ("policy/ratio_max", "policy/drift_max", "policy/sampler_gap_max")


def diagnostics(
    objective: Objective,
    logp: Array,
    entropy: Array,
    terms: TokenTerms,
    action: Array,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What explains an update: sums over action tokens, and maxima over them; all scalars.

    The drift is what updates on this rollout have changed; the sampler's gap is none of that, but
    what scorer and sampler made of the same policy, or of one a step older.
    """
    kept = action.astype(jnp.float32)
    change = log_ratio(logp, terms.old_logp)
    ratio = jnp.exp(_at_most(change))
    advantage = terms.advantage
    # Clipped tokens are those whose gradient the clip cuts off.
    low = (ratio < 1 - objective.clip_low) & (advantage < 0)
    high = (ratio > 1 + objective.clip_high) & (advantage > 0)
    drift, gap = jnp.abs(change), jnp.abs(_old(logp, terms.old_logp) - terms.sampler_logp)
    kl = jnp.zeros_like(logp) if terms.ref_logp is None else kl_k3(logp, terms.ref_logp)
    weight, capped = importance(objective, logp, terms), jnp.zeros_like(logp)
    if objective.importance_level != "none":
        log_cap = jnp.log(objective.importance_cap)
        capped = _sampler_log_ratio(objective, logp, terms) > log_cap
    values = entropy, kl, low, high, drift, gap, weight, capped
    sums = [jnp.sum(jnp.where(action, value, 0) * kept) for value in values]
    maxima = [jnp.max(jnp.where(action, value, 0)) for value in (ratio, drift, gap)]
    return dict(zip(SUMS, sums)), dict(zip(MAXIMA, maxima))
