"""The losses that an update can minimize: token losses, token weights, and diagnostic metrics.

A component sums over tokens and gives one divisor for the global batch, so the loss does not depend
on microbatches or the mesh. Arrays are of one shape, log-probabilities in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from grpo_jax.algorithm import losses
from grpo_jax.structs import Array, Experience

Take = Callable[[Array], Array]


class LossComponent(Protocol):
    """One loss. `metric` is its logged name; `sums` and `maxima` are those of `diagnostics`."""

    metric: str
    sums: tuple[str, ...]
    maxima: tuple[str, ...]

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> Any:
        """The inputs of `token_loss` at the tokens of a microbatch.

        `take` gathers values by token [P, G, C] to these tokens, `take_of_completion` values by
        completion [P, G].
        """

    def weights(self, action_BT: Array) -> tuple[Array, Array]:
        """Weight of each token in the sum, float32 [B, T], and the divisor of the sum."""

    def token_loss(self, logp: Array, entropy: Array, terms: Any) -> Array:
        """Unweighted loss of each token."""

    def diagnostics(
        self, logp: Array, entropy: Array, terms: Any, action: Array
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Sums over action tokens, whose means are logged, and maxima over them."""


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The policy-gradient objective of GRPO and its relatives (`losses.token_loss`)."""

    objective: losses.Objective

    metric: ClassVar[str] = "policy/loss"
    sums: ClassVar[tuple[str, ...]] = losses.SUMS
    maxima: ClassVar[tuple[str, ...]] = losses.MAXIMA

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> losses.TokenTerms:
        old, sampler = part.old_logp_PGC, part.rollouts.logp_PGC
        ratio = None
        if self.objective.sums_sequences:
            ratio = take_of_completion(losses.sequence_log_ratio(old, sampler, part.action_PGC))
        return losses.TokenTerms(
            advantage=take_of_completion(part.advantage_PG),
            sampler_logp=take(sampler),
            old_logp=None if old is None else take(old),
            ref_logp=None if part.ref_logp_PGC is None else take(part.ref_logp_PGC),
            sequence_log_ratio=ratio,
            kl_coef=_each(take_of_completion, part.kl_coef_PG),
            entropy_coef=_each(take_of_completion, part.entropy_coef_PG),
            policy_weight=_each(take, part.top_entropy_PGC),
        )

    def weights(self, action_BT: Array) -> tuple[Array, Array]:
        return losses.weights(action_BT, self.objective)

    def token_loss(self, logp: Array, entropy: Array, terms: losses.TokenTerms) -> Array:
        return losses.token_loss(self.objective, logp, entropy, terms)

    def diagnostics(self, logp, entropy, terms: losses.TokenTerms, action):
        return losses.diagnostics(self.objective, logp, entropy, terms, action)


def _each(take: Take, values: Array | None) -> Array | None:
    return None if values is None else take(values)


@dataclasses.dataclass(frozen=True)
class NLLLoss:
    """Negative log-likelihood of given completions: supervised training.

    Its mean over all action tokens of the batch is the cross-entropy of the completions.
    """

    metric: ClassVar[str] = "sft/loss"
    sums: ClassVar[tuple[str, ...]] = ()
    maxima: ClassVar[tuple[str, ...]] = ()

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> tuple[()]:
        return ()

    def weights(self, action_BT: Array) -> tuple[Array, Array]:
        weight_BT = action_BT.astype("float32")
        return weight_BT, weight_BT.sum()

    def token_loss(self, logp: Array, entropy: Array, terms: tuple[()]) -> Array:
        return -logp

    def diagnostics(self, logp, entropy, terms, action):
        return {}, {}
