"""The losses that an update can minimize: their terms, weights, and diagnostic metrics.

A component sums losses, of tokens, completions or groups, and gives one divisor for the global
batch, so the loss does not depend on microbatches or the mesh. Log-probabilities are in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from grpo_jax.algorithm import diagnostics, losses
from grpo_jax.algorithm.objective import Objective, TokenTerms
from grpo_jax.structs import Array, Experience

Take = Callable[[Array], Array]


class LossComponent(Protocol):
    """One loss. `metric` is its logged name; `sums` and `maxima` are those of `diagnostics`.

    The loss of a token is a function of that token alone. With `needs_completions` a component sees
    whole completions, [P, G, C], and its losses are of tokens, [P, G, C], of completions, [P, G],
    or of groups, [P]. A loss of groups needs each group in one row (`Scorer.whole`).

    With `reads_best`, which is of losses of tokens, `diagnostics` has after `entropy` the
    log-probability of the likeliest token.

    A component of a model with a scalar head (`scalar_losses.py`) has values in place of `logp`
    and `entropy`: `loss(value, terms)`, `diagnostics(value, terms, action)`.
    """

    metric: str
    sums: tuple[str, ...]
    maxima: tuple[str, ...]
    needs_completions: bool
    reads_best: bool

    def reads_entropy(self, part: Experience) -> bool:
        """Whether the loss has a gradient in the entropy."""

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> Any:
        """The inputs of `loss` at the tokens of a microbatch.

        `take` gathers values by token [P, G, C] to these tokens, `take_of_completion` values by
        completion [P, G]. With `needs_completions` the tokens are [P, G, C].
        """

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        """Weight of each loss in the sum, float32 of the losses' shape, and the sum's divisor."""

    def loss(self, logp: Array, entropy: Array, terms: Any) -> Array:
        """Unweighted losses."""

    def diagnostics(
        self, logp: Array, entropy: Array, terms: Any, action: Array
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Sums of a microbatch, and maxima over its action tokens."""

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        """What is logged of the sums over the global batch; `tokens` counts action tokens."""


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The policy-gradient objective of GRPO and its relatives (`losses.token_loss`)."""

    objective: Objective

    metric: ClassVar[str] = "policy/loss"
    maxima: ClassVar[tuple[str, ...]] = diagnostics.MAXIMA
    reads_best: ClassVar[bool] = False

    @property
    def sums(self) -> tuple[str, ...]:
        return diagnostics.sums(self.objective)

    @property
    def needs_completions(self) -> bool:
        return self.objective.needs_completions

    def reads_entropy(self, part: Experience) -> bool:
        return self.objective.entropy_coef != 0 or part.entropy_coef_PG is not None

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> TokenTerms:
        old, sampler = part.old_logp_PGC, part.rollouts.logp_PGC
        ratio = None
        if self.objective.sums_sequences:
            ratio = take_of_completion(losses.sequence_log_ratio(old, sampler, part.action_PGC))
        take_advantage = take if part.advantage.ndim == 3 else take_of_completion
        return TokenTerms(
            advantage=take_advantage(part.advantage),
            sampler_logp=take(sampler),
            old_logp=None if old is None else take(old),
            ref_logp=None if part.ref_logp_PGC is None else take(part.ref_logp_PGC),
            sequence_log_ratio=ratio,
            action=take(part.action_PGC) if self.needs_completions else None,
            kl_coef=_each(take_of_completion, part.kl_coef_PG),
            entropy_coef=_each(take_of_completion, part.entropy_coef_PG),
            policy_weight=_each(take, part.top_entropy_PGC),
        )

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        return losses.weights(action_PGC, self.objective)

    def loss(self, logp: Array, entropy: Array, terms: TokenTerms) -> Array:
        return losses.token_loss(self.objective, logp, entropy, terms)

    def diagnostics(self, logp, entropy, terms: TokenTerms, action):
        return diagnostics.diagnostics(self.objective, logp, entropy, terms, action)

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        return means_of_tokens(sums)


@dataclasses.dataclass(frozen=True)
class AroundPolicyLoss:
    """The parts of a loss that contains the policy's which are the policy's own."""

    policy: PolicyLoss

    reads_best: ClassVar[bool] = False

    @property
    def maxima(self) -> tuple[str, ...]:
        return self.policy.maxima

    @property
    def needs_completions(self) -> bool:
        return self.policy.needs_completions

    def reads_entropy(self, part: Experience) -> bool:
        return self.policy.reads_entropy(part)


def _each(take: Take, values: Array | None) -> Array | None:
    return None if values is None else take(values)


def means_of_tokens(sums: dict[str, Array]) -> dict[str, Array]:
    """Each sum over the number of action tokens."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    return {name: value / tokens for name, value in sums.items() if name != "tokens"}


@dataclasses.dataclass(frozen=True)
class NLLLoss:
    """Negative log-likelihood of given completions: supervised training.

    "nll": its mean over all action tokens of the batch is the cross-entropy of the completions.
    "dft": each token's is weighted by its probability p, as a constant: -sg(p) log p (Wu et al.
    2025, arXiv:2508.05629, equation 9; TRL's loss_type "dft").
    """

    kind: str = "nll"  # or "dft"
    of_tokens: bool = False  # whether entropy and accuracy are measured

    metric: ClassVar[str] = "sft/loss"
    maxima: ClassVar[tuple[str, ...]] = ()
    needs_completions: ClassVar[bool] = False

    @property
    def sums(self) -> tuple[str, ...]:
        of_tokens = ("sft/entropy", "sft/token_accuracy") if self.of_tokens else ()
        return ("sft/nll",) * (self.kind == "dft") + of_tokens

    @property
    def reads_best(self) -> bool:
        return self.of_tokens

    def reads_entropy(self, part: Experience) -> bool:
        return False

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> tuple[()]:
        return ()

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        weight_PGC = action_PGC.astype("float32")
        return weight_PGC, weight_PGC.sum()

    def loss(self, logp: Array, entropy: Array, terms: tuple[()]) -> Array:
        if self.kind == "dft":
            return -jax.lax.stop_gradient(jnp.exp(logp)) * logp
        return -logp

    def diagnostics(self, logp, entropy, *rest):
        *best, _, action = rest
        total = lambda x: jnp.where(action, x, 0.0).sum()  # noqa: E731
        sums = {"sft/nll": total(-logp)} if self.kind == "dft" else {}
        if self.of_tokens:
            right = (logp >= best[0]).astype("float32")
            sums |= {"sft/entropy": total(entropy), "sft/token_accuracy": total(right)}
        return sums, {}

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        return means_of_tokens(sums)
