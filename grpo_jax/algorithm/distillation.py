"""Losses of a policy that learns from a teacher on the completions that it draws itself.

The teacher's log-probabilities come as values of the experience, or its whole distributions in the
sweep of the vocabulary (`learner/logprobs.py`). Log-probabilities and divergences are in nats.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from grpo_jax.algorithm.components import AroundPolicyLoss, PolicyLoss, Take, means_of_tokens
from grpo_jax.algorithm.objective import TokenTerms
from grpo_jax.structs import Array, Experience


def with_reward(advantage: Array, coef: float, teacher_logp_PGC: Array, logp_PGC: Array) -> Array:
    """Advantages of tokens, [P, G, C]: `advantage` plus the teacher's reward.

    `advantage`: of completions, [P, G], or of tokens, [P, G, C].

    That is `coef` times log-probability of the teacher minus that of the policy before the step's
    updates, of each token alone: on average the policy gradient of -KL(policy || teacher) at each
    token (Thinking Machines 2025, "On-policy distillation"; prime-rl).
    """
    advantage = advantage if advantage.ndim == 3 else advantage[..., None]
    return advantage + coef * (teacher_logp_PGC - logp_PGC)


@struct.dataclass
class TeacherTerms:
    """What the loss of each token knows; arrays of one shape."""

    policy: TokenTerms
    teacher_logp: Array


@dataclasses.dataclass(frozen=True)
class RewardedByTeacher(PolicyLoss):
    """The policy loss, with the advantages of `with_reward`; it also measures distill/kl."""

    @property
    def sums(self) -> tuple[str, ...]:
        return (*super().sums, "distill/kl")

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> TeacherTerms:
        of_policy = super().terms(part, take, take_of_completion)
        return TeacherTerms(of_policy, take(part.teacher_logp_PGC))

    def loss(self, logp: Array, entropy: Array, terms: TeacherTerms) -> Array:
        return super().loss(logp, entropy, terms.policy)

    def diagnostics(self, logp: Array, entropy: Array, terms: TeacherTerms, action: Array):
        sums, maxima = super().diagnostics(logp, entropy, terms.policy, action)
        kl = jnp.where(action, logp - terms.teacher_logp, 0.0).sum()
        return sums | {"distill/kl": kl}, maxima


@dataclasses.dataclass(frozen=True)
class DivergenceLoss(AroundPolicyLoss):
    """The policy loss, plus `coef` times the divergence from the teacher at each token.

    The divergence is `logprobs.loss`'s, over the whole vocabulary, with this `beta`.
    """

    coef: float
    beta: float

    metric: ClassVar[str] = "distill/total"

    @property
    def sums(self) -> tuple[str, ...]:
        return (*self.policy.sums, "policy/loss", "distill/loss", "distill/kl")

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> TokenTerms:
        return self.policy.terms(part, take, take_of_completion)

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        return self.policy.weights(action_PGC)

    def loss(self, logp: Array, entropy: Array, terms: TokenTerms, divergence: Array) -> Array:
        return self.policy.loss(logp, entropy, terms) + self.coef * divergence

    def diagnostics(
        self,
        logp: Array,
        entropy: Array,
        divergence: Array,
        kl: Array,
        terms: TokenTerms,
        action: Array,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        sums, maxima = self.policy.diagnostics(logp, entropy, terms, action)
        more = {
            "policy/loss": self.policy.loss(logp, entropy, terms),
            "distill/loss": divergence,
            "distill/kl": kl,
        }
        return sums | {n: jnp.where(action, x, 0.0).sum() for n, x in more.items()}, maxima

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        return means_of_tokens(sums)
