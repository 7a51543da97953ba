"""The objective, as arithmetic on log-probabilities; no model here.

Every function works on arrays of one shape, float32, log-probabilities in nats: token by token, or
if the objective `needs_completions` with the tokens of one completion along the last axis. Token
losses are summed with `weights` and divided by their count once, over the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithm import kl, surrogates
from grpo_jax.algorithm.objective import Objective, TokenTerms, row
from grpo_jax.algorithm.surrogates import MOST, log_ratio
from grpo_jax.structs import Array


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
    ("mask"). TRL's modes of the same names do the same. A ratio below the floor is raised to it, or
    taken as 0 ("mask" of both sides: IcePop, Ling team 2025, arXiv:2510.18855, section 3.2). The
    ratio of the clip stays that of policy to old policy.
    """
    if objective.importance_level == "none":
        return jnp.ones_like(logp)
    ratio = jnp.exp(sampler_log_ratio(objective, logp, terms))
    is_mask, cap, floor = (
        objective.importance_bound == "mask",
        objective.importance_cap,
        objective.importance_floor,
    )
    ratio = jnp.where(ratio > cap, 0.0 if is_mask else cap, ratio)
    if floor:
        ratio = jnp.where(ratio < floor, 0.0 if is_mask else floor, ratio)
    return ratio


def sampler_log_ratio(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """Log of the ratio π_old / π_sampler at the level of the correction."""
    if objective.sums_sequences:
        return terms.sequence_log_ratio
    return surrogates.old(logp, terms.old_logp) - terms.sampler_logp


def is_off_policy(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """True for completions that the off-policy sequence mask leaves out, [..., 1].

    Those with A < 0 whose tokens have become less likely since they were sampled, by more than
    `max_sequence_drift` nats on average (DeepSeek-V3.2, arXiv:2512.02556, section 3.1; TRL's
    `off_policy_mask_threshold`).
    """
    drift = terms.sampler_logp - jax.lax.stop_gradient(logp)
    mean = surrogates.mean_of_completion(drift, terms.action)
    return (terms.advantage < 0) & (mean > objective.max_sequence_drift)


def _is_far(objective: Objective, logp: Array, terms: TokenTerms) -> Array | None:
    """True where a log-ratio that the loss exponentiates is above 20 nats; None: there is none."""
    far = None
    if objective.surrogate == "sampler_mask":
        far = logp - terms.sampler_logp > MOST
    elif objective.surrogate != "reinforce":
        far = log_ratio(logp, terms.old_logp) > MOST
    if objective.kl_coef and objective.kl_estimator in ("k3", "k3_ratio"):
        beyond = terms.ref_logp - logp > MOST
        far = beyond if far is None else far | beyond
    return far


def token_loss(objective: Objective, logp: Array, entropy: Array, terms: TokenTerms) -> Array:
    """Loss of each token before weighting.

    The importance weighs the surrogate alone, as in TRL: the KL and the entropy are of the policy,
    whoever drew the tokens. A token more than 20 nats likelier than under the old policy, or less
    likely than under the reference of a KL term, has no gradient in `logp`.
    """
    far = _is_far(objective, logp, terms)
    if far is not None:
        logp = jnp.where(far, jax.lax.stop_gradient(logp), logp)
    corrects = objective.importance_level != "none"
    weight = importance(objective, logp, terms) if corrects else jnp.ones_like(logp)
    loss = surrogates.surrogate(objective, logp, terms, weight)
    if corrects and objective.surrogate != "vespo":  # whose own weight holds the correction
        loss *= weight
    if objective.max_sequence_drift:
        loss = jnp.where(is_off_policy(objective, logp, terms), 0.0, loss)
    if terms.policy_weight is not None:
        loss *= terms.policy_weight
    if objective.kl_coef:
        coef = objective.kl_coef if terms.kl_coef is None else terms.kl_coef
        loss += coef * kl.loss(objective, logp, terms)
    if objective.entropy_coef or terms.entropy_coef is not None:
        coef = objective.entropy_coef if terms.entropy_coef is None else terms.entropy_coef
        loss -= coef * entropy
    return loss


def weights(action: Array, objective: Objective, dtype: Any = jnp.float32) -> tuple[Array, Array]:
    """Weight of each token in the loss sum, `dtype` [..., T], and what to divide the sum by.

    `action`: bool [..., T], the tokens of a sequence along the last axis.

    "token": every token of the batch alike (DAPO); "sequence": every sequence alike, its tokens
    sharing (the GRPO paper); "sequence_sum": the sums of sequences, averaged (LUSPO,
    arXiv:2602.05261); "constant": every token alike, divided by sequences times the completion
    limit, so that length has no influence (Dr. GRPO). A sequence without an action does not count,
    except for "constant".
    """
    weight = action.astype(dtype)
    length = weight.sum(axis=-1, keepdims=True)
    if objective.normalizer == "token":
        return weight, weight.sum()
    if objective.normalizer == "constant":
        return weight, jnp.asarray(length.size * objective.max_tokens, dtype)
    sequences = (length > 0).sum().astype(dtype)
    if objective.normalizer == "sequence":
        weight /= jnp.maximum(length, 1.0)
    return weight, sequences


def evaluate(
    options: Mapping[str, Any] | str,
    *,
    logp_BT: np.ndarray,
    advantage_B: np.ndarray,
    action_BT: np.ndarray,
    old_logp_BT: np.ndarray | None = None,
    ref_logp_BT: np.ndarray | None = None,
    sampler_logp_BT: np.ndarray | None = None,
    entropy_BT: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """The loss of a batch and its gradient in `logp_BT`, to check a number by hand.

    B completions of at most T tokens; `action_BT` (bool) marks the tokens of the loss. `options`: a
    preset's name, or a dict of the config's names, such as {"surrogate": "cispo"} or
    {"rollout_correction.level": "token"}; "rollout.max_tokens" is T if it is not given.
    `advantage_B` may have a value for each token, [B, T]. Without `old_logp_BT` the old policy is
    the current one, as in a rollout's only update. The entropy is a constant here: its bonus has a
    value and no gradient in `logp_BT`. All is computed in the precision of `logp_BT`.

    Raises ValueError for an option that does not exist, and for an array that the loss needs.
    """
    chosen = {"rollout.max_tokens": logp_BT.shape[1], **row(options)}
    objective = Objective.of(chosen)
    needed = {
        "ref_logp_BT": (ref_logp_BT, objective.kl_coef, "kl_coef"),
        "entropy_BT": (entropy_BT, objective.entropy_coef, "entropy_coef"),
        "sampler_logp_BT": (
            sampler_logp_BT,
            objective.importance_level != "none"
            or objective.surrogate == "sampler_mask"
            or objective.max_sequence_drift,
            "the options",
        ),
    }
    for name, (array, reads, why) in needed.items():
        if array is None and reads:
            raise ValueError(f"{name} is missing, and {why} of the loss needs it.")
    with jax.enable_x64(np.asarray(logp_BT).dtype == np.float64):
        return _evaluate(
            objective,
            np.asarray(logp_BT),
            np.asarray(advantage_B),
            np.asarray(action_BT, bool),
            old_logp_BT,
            ref_logp_BT,
            sampler_logp_BT,
            entropy_BT,
        )


def _evaluate(objective, logp, advantage, action, old_logp, ref_logp, sampler_logp, entropy):
    advantage = advantage if advantage.ndim == 2 else advantage[:, None]
    take = lambda x: None if x is None else jnp.where(action, jnp.asarray(x), 0)  # noqa: E731
    ratio = None
    if objective.sums_sequences:
        from_old = logp if old_logp is None else old_logp
        ratio = sequence_log_ratio(from_old, sampler_logp, action)[:, None]
    ones = jnp.ones_like(logp)
    terms = TokenTerms(
        advantage=jnp.asarray(advantage) * ones,
        sampler_logp=take(sampler_logp),
        old_logp=take(old_logp),
        ref_logp=take(ref_logp),
        sequence_log_ratio=None if ratio is None else ratio * ones,
        action=jnp.asarray(action),
    )
    entropy = take(np.zeros_like(logp) if entropy is None else entropy)
    weight, count = weights(jnp.asarray(action), objective, logp.dtype)

    def loss(logp):
        per_token = token_loss(objective, take(logp), entropy, terms)
        return jnp.sum(jnp.where(action, weight * per_token, 0)) / jnp.maximum(count, 1)

    value, slope = jax.value_and_grad(loss)(jnp.asarray(logp))
    return float(value), np.asarray(slope)
