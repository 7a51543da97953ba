"""Estimates of the KL divergence between policy and reference, from sampled tokens."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.algorithm.objective import Objective, TokenTerms
from grpo_jax.algorithm.surrogates import at_most, log_ratio
from grpo_jax.structs import Array


def k3(logp: Array, ref_logp: Array) -> Array:
    """Estimate of KL(policy ‖ reference) at each sampled token, never below 0.

    exp(d) - d - 1 with d = ref - policy (Schulman's k3; arXiv:2402.03300, equation 4). Its gradient
    on-policy is on average that of KL(reference ‖ policy), which pulls towards the reference too.
    A d above 20 nats counts as 20.
    """
    d = at_most(ref_logp - logp)
    return jnp.expm1(d) - d


def loss(objective: Objective, logp: Array, terms: TokenTerms) -> Array:
    """The KL's term of the loss at each token, without its coefficient.

    With l = policy - reference (Schulman 2020, "Approximating KL divergence"; arXiv:2510.01555 for
    the gradients on-policy, on average): "k1", l, whose gradient is 0; "k2", l² / 2, that of
    KL(policy ‖ reference); "k3", that of KL(reference ‖ policy); "k3_ratio", k3 times the ratio of
    the token to the old policy, that of KL(policy ‖ reference) (DeepSeek-V3.2, arXiv:2512.02556;
    TRL's since 1.10, `use_bias_correction_kl`). With one update a rollout k3 and k3_ratio have one
    value, not one gradient.
    """
    if objective.kl_estimator in ("k1", "k2"):
        difference = logp - terms.ref_logp
        return difference if objective.kl_estimator == "k1" else difference**2 / 2
    kl = k3(logp, terms.ref_logp)
    if objective.kl_estimator == "k3_ratio":
        kl *= jnp.exp(at_most(log_ratio(logp, terms.old_logp)))
    return kl
