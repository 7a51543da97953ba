"""The component that sums policy loss and nll of a hybrid (`hybrids.py`), in one sweep."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct

from grpo_jax.algorithm.components import AroundPolicyLoss, Take, means_of_tokens
from grpo_jax.algorithm.hybrids import Hybrid, given_tokens
from grpo_jax.algorithm.objective import TokenTerms
from grpo_jax.structs import Array, Experience

_WHOLE = ("policy/loss", "hybrid/nll", "hybrid/nll_tokens")  # sums that are logged as they are


@struct.dataclass
class HybridTerms:
    """What the losses of each token know; arrays of one shape."""

    policy: TokenTerms
    given: Array  # bool: of a demonstration
    policy_weight: Array
    nll_weight: Array
    mix: Array | None  # share of the nll; None: both losses are summed


@dataclasses.dataclass(frozen=True)
class HybridLoss(AroundPolicyLoss):
    """Policy loss and nll with the weights of `Hybrid.weights`, which contain their divisors.

    Diagnostics of the policy are of drawn tokens alone.
    """

    hybrid: Hybrid

    metric: ClassVar[str] = "hybrid/loss"

    @property
    def sums(self) -> tuple[str, ...]:
        return (*self.policy.sums, *_WHOLE, "drawn")

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> HybridTerms:
        given_PGC = given_tokens(part, part.action_PGC)
        drawn = part.replace(action_PGC=part.action_PGC & ~given_PGC)
        return HybridTerms(
            policy=self.policy.terms(drawn, take, take_of_completion),
            given=take(given_PGC),
            policy_weight=take(part.policy_weight_PGC),
            nll_weight=take(part.nll_weight_PGC),
            mix=None if part.mix_PG is None else take_of_completion(part.mix_PG),
        )

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        return action_PGC.astype("float32"), jnp.float32(1)

    def loss(self, logp: Array, entropy: Array, terms: HybridTerms) -> Array:
        policy, nll = self._losses(logp, entropy, terms)
        nll *= self.hybrid.nll_coef
        if terms.mix is None:
            return policy + nll
        return (1 - terms.mix) * policy + terms.mix * nll

    def _losses(self, logp: Array, entropy: Array, terms: HybridTerms) -> tuple[Array, Array]:
        """Weighted policy loss and nll of each token."""
        drawn = self.policy.loss(logp, entropy, self.hybrid.of_drawn(terms.policy, entropy))
        policy = self.hybrid.policy_loss(drawn, logp, terms.given, terms.policy.advantage)
        weighed = lambda weight, x: jnp.where(weight != 0, weight * x, 0.0)  # noqa: E731
        nll = self.hybrid.nll(logp, entropy)
        return weighed(terms.policy_weight, policy), weighed(terms.nll_weight, nll)

    def diagnostics(self, logp: Array, entropy: Array, terms: HybridTerms, action: Array):
        drawn = action & ~terms.given
        sums, maxima = self.policy.diagnostics(logp, entropy, terms.policy, drawn)
        policy, _ = self._losses(logp, entropy, terms)
        is_imitated = terms.nll_weight != 0
        nll = jnp.where(is_imitated, terms.nll_weight * -logp, 0.0)
        whole = (jnp.where(action, x, 0.0).sum() for x in (policy, nll, is_imitated))
        drawn = drawn.sum().astype(jnp.float32)
        return sums | dict(zip(_WHOLE, whole)) | {"drawn": drawn}, maxima

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        of_drawn = {name: sums[name] for name in self.policy.sums} | {"tokens": sums["drawn"]}
        return {name: sums[name] for name in _WHOLE} | means_of_tokens(of_drawn)
