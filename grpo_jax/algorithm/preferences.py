"""Losses of preferences, as arithmetic on the log-probabilities of whole completions.

Data of pairs say which of two completions of a prompt is better: the chosen one. Unpaired data say
of each completion whether it is desirable. A log-ratio is log policy / reference of a completion,
in nats: summed over its tokens, or their mean. Times `beta` it is the completion's implicit reward
(Rafailov et al. 2023, arXiv:2305.18290, equation 5). Arrays are of one shape, an element for each
pair or completion; nothing here knows a model. docs/preference.md sets the formulas beside TRL's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from grpo_jax.algorithm.presets import PAIRS
from grpo_jax.structs import Array


@dataclasses.dataclass(frozen=True)
class Preference:
    """The constants of a loss; `config.preference` documents each by the same name."""

    loss: str = "sigmoid"  # one of `presets.PAIRS` or `presets.UNPAIRED`
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: str = "start"  # or "none": log-ratios are log-probabilities
    margin: float = 0.0  # of implicit rewards, of "sigmoid"
    log_ratio: str = "auto"  # or "sum" or "mean", over the tokens of a completion
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def is_of_pairs(self) -> bool:
        return self.loss in PAIRS

    @property
    def reads_reference(self) -> bool:
        return not self.is_of_odds and self.reference != "none"

    @property
    def is_of_odds(self) -> bool:
        """Whether the loss compares log-odds of mean log-probabilities: ORPO's."""
        return self.loss == "orpo"

    @property
    def reads_divergence(self) -> bool:
        """Whether the loss compares with KTO's reference point."""
        return self.loss == "kto"

    @property
    def takes_means(self) -> bool:
        """Whether the log-ratio of a completion is the mean over its tokens."""
        is_usual = self.log_ratio == "auto" and self.loss in ("ipo", "orpo")
        return is_usual or self.log_ratio == "mean"


def of_pair(preference: Preference, chosen: Array, rejected: Array) -> Array:
    """Loss of each pair, from the log-ratios of both completions.

    With d = chosen - rejected and s the logistic sigmoid:

    "sigmoid": -log s(beta d), DPO (arXiv:2305.18290, equation 7). With label smoothing e,
    -(1 - e) log s(beta d) - e log s(-beta d): conservative DPO, for labels of which a share e is
    wrong (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO"). With a
    margin, beta d - margin in the place of beta d. Log-ratios that are log-probabilities, without a
    reference, make it CPO's (Xu et al. 2024, arXiv:2401.08417, equation 3), and their means with a
    margin SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6).
    "ipo": (d - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, equation 17).
    "hinge": max(0, 1 - beta d) (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425, of log-ratios as in
    RSO, Liu et al. 2023, arXiv:2309.06657).
    "robust": (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e), without bias by a share e of
    wrong labels (Chowdhury et al. 2024, arXiv:2403.00409).
    "apo_zero": 1 - s(beta chosen) + s(beta rejected): the chosen likelier, the rejected less likely
    (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7).
    "apo_down": s(beta chosen) + 1 - s(beta d): both less likely, the rejected more so (equation 8).
    """
    beta, e = preference.beta, preference.label_smoothing
    scaled = beta * (chosen - rejected)
    if preference.margin:
        scaled = scaled - preference.margin
    loss = preference.loss
    if loss == "sigmoid":
        plain = -jax.nn.log_sigmoid(scaled)
        return plain if not e else (1 - e) * plain - e * jax.nn.log_sigmoid(-scaled)
    if loss == "ipo":
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return jax.nn.relu(1 - scaled)
    if loss == "robust":
        right, wrong = -jax.nn.log_sigmoid(scaled), -jax.nn.log_sigmoid(-scaled)
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    # 1 - s(x) as s(-x), which does not round to 0 for a large x.
    if loss == "apo_zero":
        return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)
    assert loss == "apo_down", loss
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-scaled)


def log_odds(mean_logp: Array) -> Array:
    """Log of p / (1 - p), where log p is the mean log-probability of a completion's tokens.

    Hong et al. 2024, arXiv:2403.07691, equation 4. A p above 1 - 1e-6 counts as that, so that the
    log-odds of a completion that the policy is sure of are finite.
    """
    logp = jnp.minimum(mean_logp, -1e-6)
    # Each side of log 1/2 has its form of log(1 - p) that does not cancel; the other branch gets a
    # value that keeps its gradient finite.
    near = logp > -jnp.log(2.0)
    of_near = jnp.log(-jnp.expm1(jnp.where(near, logp, -0.5)))
    of_far = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logp)))
    return logp - jnp.where(near, of_near, of_far)


def odds_ratio(preference: Preference, chosen_mean: Array, rejected_mean: Array) -> Array:
    """-beta log s(log-odds of the chosen - log-odds of the rejected) of each pair, "orpo".

    From mean log-probabilities, without a reference (arXiv:2403.07691, equation 7). The nll of the
    chosen, which equation 6 adds to it, is `nll_weight` of `Experience`.
    """
    difference = log_odds(chosen_mean) - log_odds(rejected_mean)
    return -preference.beta * jax.nn.log_sigmoid(difference)


def of_completion(
    preference: Preference, log_ratio: Array, is_desirable: Array, divergence: Array | float
) -> Array:
    """Loss of each completion of unpaired data, from its log-ratio and its label (bool).

    "kto": w s(beta (z - x)) if it is desirable, w s(beta (x - z)) if not, where x is the log-ratio,
    z the `divergence` (`reference_point`), and w the weight of the label: KTO (Ethayarajh et al.
    2024, arXiv:2402.01306, section 4.1). "apo_zero_unpaired": the same with z = 0, "apo_zero" of
    each completion alone.
    """
    if not preference.reads_divergence:
        divergence = 0.0
    sign = jnp.where(is_desirable, 1.0, -1.0).astype(log_ratio.dtype)
    weight = jnp.where(is_desirable, preference.desirable_weight, preference.undesirable_weight)
    better = sign * (log_ratio - divergence)
    return weight.astype(log_ratio.dtype) * jax.nn.sigmoid(-preference.beta * better)


def reference_point(log_ratio: Array, is_there: Array) -> Array:
    """KTO's z, a scalar: the mean log-ratio of mismatched completions where `is_there`, at least 0.

    A mismatched completion is one of another prompt, so that the mean estimates the divergence of
    the policy from the reference (arXiv:2402.01306, section 4.1). It has no gradient.
    """
    count = jnp.maximum(is_there.sum(), 1)
    mean = jnp.where(is_there, log_ratio, 0.0).sum() / count
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
