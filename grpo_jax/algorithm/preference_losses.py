"""The losses of preferences as components of an update: of pairs, and of labelled completions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct

from grpo_jax.algorithm import preferences
from grpo_jax.algorithm.components import Take
from grpo_jax.algorithm.preferences import Preference
from grpo_jax.structs import Array, Experience

_BY_LABEL = (
    "preference/reward_chosen",
    "preference/reward_rejected",
    "preference/logp_chosen",
    "preference/logp_rejected",
)
_ENTROPY = "preference/entropy"
_COUNTS = ("chosen", "rejected", "chosen_tokens")  # what the sums are divided by; not logged


@struct.dataclass
class PreferenceTerms:
    """What the loss of a pair or a completion knows besides the log-probabilities."""

    action_PGC: Array
    ref_logp_PG: Array | None  # None: the loss reads no reference
    nll_weight_PG: Array | None  # None: no nll beside the loss
    desirable_PG: Array | None = None  # bool; None: pairs
    divergence_PG: Array | None = None  # None: the loss reads none

    @staticmethod
    def of(part: Experience, take: Take) -> PreferenceTerms:
        return PreferenceTerms(
            take(part.action_PGC),
            part.ref_logp_PG,
            part.nll_weight_PG,
            part.desirable_PG,
            part.divergence_PG,
        )

    @property
    def lengths(self) -> Array:
        """Action tokens of each completion, [P, G], at least 1."""
        return jnp.maximum(self.action_PGC.sum(-1), 1)

    def log_ratio(self, preference: Preference, logp_PGC: Array) -> Array:
        """What the loss compares, [P, G]: `reward`, or its mean over the tokens."""
        x_PG = self.reward(preference, logp_PGC)
        is_sum = preference.takes_means and preference.reads_reference
        return x_PG / self.lengths if is_sum else x_PG

    def reward(self, preference: Preference, logp_PGC: Array) -> Array:
        """The implicit reward over beta, [P, G]: the summed log-ratio, or log-probability.

        Without a reference it is the mean where the loss compares means.
        """
        logp_PG = logp_PGC.sum(-1)
        if preference.reads_reference:
            return logp_PG - self.ref_logp_PG
        return logp_PG / self.lengths if preference.takes_means else logp_PG


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """The loss of pairs: groups of a chosen and a rejected completion, in this order.

    The nll of chosen completions may stand beside it, as `Experience.nll_weight_PG` says.
    """

    preference: Preference
    of_tokens: bool = False  # whether the entropy is measured

    metric: ClassVar[str] = "preference/loss"
    maxima: ClassVar[tuple[str, ...]] = ()
    needs_completions: ClassVar[bool] = True
    reads_best: ClassVar[bool] = False

    @property
    def sums(self) -> tuple[str, ...]:
        odds = ("preference/log_odds_ratio",) * self.preference.is_of_odds
        entropy = (_ENTROPY,) * self.of_tokens
        both = "preference/reward_accuracy", "preference/nll"
        return (*_BY_LABEL, *both, *odds, *entropy, *_COUNTS)

    def reads_entropy(self, part: Experience) -> bool:
        return False

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> PreferenceTerms:
        return PreferenceTerms.of(part, take)

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        weight_P = action_PGC.any(-1).all(-1).astype("float32")
        return weight_P, weight_P.sum()

    def loss(self, logp_PGC: Array, entropy: Array, terms: PreferenceTerms) -> Array:
        """Loss of each pair, [P]."""
        x_PG = terms.log_ratio(self.preference, logp_PGC)
        of_pair = preferences.odds_ratio if self.preference.is_of_odds else preferences.of_pair
        loss_P = of_pair(self.preference, x_PG[:, 0], x_PG[:, 1])
        if terms.nll_weight_PG is None:
            return loss_P
        return loss_P - (terms.nll_weight_PG * logp_PGC.sum(-1)).sum(-1)

    def diagnostics(self, logp_PGC, entropy, terms: PreferenceTerms, action_PGC):
        weight_P, pairs = self.weights(action_PGC)
        total = lambda x_P: (weight_P * x_P).sum()  # noqa: E731
        reward_PG = self.preference.beta * terms.reward(self.preference, logp_PGC)
        logp_PG, tokens_P = logp_PGC.sum(-1), terms.lengths[:, 0]
        sums = {
            "preference/reward_chosen": total(reward_PG[:, 0]),
            "preference/reward_rejected": total(reward_PG[:, 1]),
            "preference/logp_chosen": total(logp_PG[:, 0]),
            "preference/logp_rejected": total(logp_PG[:, 1]),
            "preference/reward_accuracy": total(reward_PG[:, 0] > reward_PG[:, 1]),
            "preference/nll": -total(logp_PG[:, 0]),
            **dict.fromkeys(_COUNTS[:2], pairs),
            "chosen_tokens": total(tokens_P),
        }
        if self.preference.is_of_odds:
            odds_PG = preferences.log_odds(terms.log_ratio(self.preference, logp_PGC))
            sums["preference/log_odds_ratio"] = total(odds_PG[:, 0] - odds_PG[:, 1])
        return sums | _entropy(self, entropy, action_PGC), {}

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        return _means(sums)


@dataclasses.dataclass(frozen=True)
class UnpairedLoss:
    """The loss of completions with a label: "kto" and its relative."""

    preference: Preference
    of_tokens: bool = False  # whether the entropy is measured

    metric: ClassVar[str] = "preference/loss"
    maxima: ClassVar[tuple[str, ...]] = ()
    needs_completions: ClassVar[bool] = True
    reads_best: ClassVar[bool] = False

    @property
    def sums(self) -> tuple[str, ...]:
        kl = ("preference/kl",) * self.preference.reads_divergence
        entropy = (_ENTROPY,) * self.of_tokens
        both = "preference/reward_accuracy", "preference/nll"
        return (*_BY_LABEL, *both, *kl, *entropy, *_COUNTS)

    def reads_entropy(self, part: Experience) -> bool:
        return False

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> PreferenceTerms:
        return PreferenceTerms.of(part, take)

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        weight_PG = action_PGC.any(-1).astype("float32")
        return weight_PG, weight_PG.sum()

    def loss(self, logp_PGC: Array, entropy: Array, terms: PreferenceTerms) -> Array:
        """Loss of each completion, [P, G]."""
        x_PG = terms.reward(self.preference, logp_PGC)
        divergence = 0.0 if terms.divergence_PG is None else terms.divergence_PG
        return preferences.of_completion(self.preference, x_PG, terms.desirable_PG, divergence)

    def diagnostics(self, logp_PGC, entropy, terms: PreferenceTerms, action_PGC):
        weight_PG, _ = self.weights(action_PGC)
        is_chosen = terms.desirable_PG
        chosen_PG, rejected_PG = weight_PG * is_chosen, weight_PG * ~is_chosen
        logp_PG = logp_PGC.sum(-1)
        x_PG = terms.reward(self.preference, logp_PGC)
        reward_PG = self.preference.beta * x_PG
        bound = 0.0 if terms.divergence_PG is None else terms.divergence_PG
        sums = {
            "preference/reward_chosen": (chosen_PG * reward_PG).sum(),
            "preference/reward_rejected": (rejected_PG * reward_PG).sum(),
            "preference/logp_chosen": (chosen_PG * logp_PG).sum(),
            "preference/logp_rejected": (rejected_PG * logp_PG).sum(),
            "preference/reward_accuracy": (weight_PG * ((x_PG > bound) == is_chosen)).sum(),
            "preference/nll": -(chosen_PG * logp_PG).sum(),
            "chosen": chosen_PG.sum(),
            "rejected": rejected_PG.sum(),
            "chosen_tokens": (chosen_PG * terms.lengths).sum(),
        }
        if self.preference.reads_divergence:
            sums["preference/kl"] = (weight_PG * bound).sum()
        return sums | _entropy(self, entropy, action_PGC), {}

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        means = _means(sums)
        both = jnp.maximum(sums["chosen"] + sums["rejected"], 1.0)
        for name in ("preference/reward_accuracy", "preference/kl"):
            if name in sums:
                means[name] = sums[name] / both
        return means


def _entropy(loss: PairLoss | UnpairedLoss, entropy: Array, action_PGC: Array) -> dict[str, Array]:
    """The summed entropy at tokens, where it is measured."""
    return {_ENTROPY: jnp.where(action_PGC, entropy, 0.0).sum()} if loss.of_tokens else {}


def _means(sums: dict[str, Array]) -> dict[str, Array]:
    """Each sum over its count; NaN where there is none, as of a batch without rejected ones."""
    over = {"preference/nll": "chosen_tokens", _ENTROPY: "tokens"}
    means = {
        name: value / sums[over.get(name, "rejected" if name.endswith("rejected") else "chosen")]
        for name, value in sums.items()
        if name not in (*_COUNTS, "tokens")
    }
    margin = means["preference/reward_chosen"] - means["preference/reward_rejected"]
    return means | {"preference/reward_margin": margin}
