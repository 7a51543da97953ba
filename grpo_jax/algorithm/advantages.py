"""Advantages: what the reward of a completion is worth beside the rewards of others.

    reward - KL -> credit -> minus the baseline -> divided by a scale -> whitened over the batch

Each arrow is a choice of `AdvantageOptions`. A reward of NaN is unknown: its completion gets 0, and
does not count among the others. Arrays keep their precision, float32 at least.

    R reward functions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithm import objective
from grpo_jax.structs import Array

CHOICES = {
    "baseline": ("mean", "leave_one_out", "length_weighted", "greedy", "none"),
    "scale_by": ("none", "std", "sample_std", "batch_std", "mean"),
    "aggregate": ("sum", "each"),
    "credit": ("reward", "best", "rank"),
    "whiten": ("none", "completions", "tokens"),
    "kl_in": ("loss", "reward"),
}


@dataclasses.dataclass(frozen=True)
class AdvantageOptions:
    """The choices of `advantages`; `config.algorithm` documents each."""

    baseline: str = "mean"
    scale_by: str = "std"
    aggregate: str = "sum"
    credit: str = "reward"
    whiten: str = "none"
    kl_in: str = "loss"
    kl_coef: float = 0.0
    weights: tuple[float, ...] = ()  # of the rewards; only `aggregate` "each" reads them

    @property
    def reads_log_probs(self) -> bool:
        """Whether the KL to the reference is a part of the reward."""
        return self.kl_in == "reward" and self.kl_coef != 0

    @property
    def compares(self) -> bool:
        """Whether an advantage compares the known completions of a group."""
        return self.credit != "reward" or self.baseline not in ("greedy", "none")

    @property
    def reads_each_reward(self) -> bool:
        """Whether rewards are given by function, [P, G, R]."""
        return self.aggregate == "each"


def advantages(
    options: AdvantageOptions,
    reward: Array,
    *,
    length_PG: Array | None = None,
    greedy: Array | None = None,
    action_PGC: Array | None = None,
    log_probs: tuple[Array, Array] | None = None,
) -> Array:
    """Advantage of each completion, [P, G].

    `reward`: the weighted sum of the rewards [P, G], or with `aggregate` "each" the rewards
    [P, G, R]. Only some options read the others: `length_PG` in tokens; `greedy`, the reward of a
    greedy completion of each prompt, [P] or [P, R]; `action_PGC`, the tokens that are trained on;
    and `log_probs` [P, G, C] of the policy and of the reference.

    "each" computes the advantages of each reward by itself and sums them with their weights, an
    unknown reward as 0; the sum is whitened over the completions of the batch, or by `whiten` over
    its tokens (GDPO: Liu et al. 2026, arXiv:2601.05242).
    """
    if options.reads_log_probs:
        reward = reward - options.kl_coef * kl_of_completions(*log_probs, action_PGC)

    def relative(reward_PG: Array, greedy_P: Array | None) -> Array:
        return group_advantages(
            reward_PG,
            scale_by=options.scale_by,
            baseline=options.baseline,
            credit=options.credit,
            length_PG=length_PG,
            greedy_P=greedy_P,
        )

    if not options.reads_each_reward:
        adv_PG = relative(reward, greedy)
        if options.whiten == "none":
            return adv_PG
        known_PG = ~jnp.isnan(reward)
    else:
        of = lambda r: None if greedy is None else greedy[:, r]  # noqa: E731
        each = [w * relative(reward[..., r], of(r)) for r, w in enumerate(options.weights)]
        adv_PG, known_PG = sum(each[1:], start=each[0]), ~jnp.isnan(reward).all(axis=-1)
    if options.compares:  # a completion without others has no advantage
        known_PG &= known_PG.sum(axis=1, keepdims=True) > 1
    if options.whiten == "tokens":
        return _whitened_by_token(adv_PG, known_PG, action_PGC)
    return _whitened(adv_PG, known_PG)


def total(options: AdvantageOptions, reward: Array) -> Array:
    """The weighted sum of rewards as `advantages` takes them, [P, G]; NaN where all are unknown."""
    if not options.reads_each_reward:
        return reward
    weighed = jnp.nansum(reward * jnp.asarray(options.weights, reward.dtype), axis=-1)
    return jnp.where(jnp.isnan(reward).all(axis=-1), jnp.nan, weighed)


def group_advantages(
    reward_PG: Array,
    *,
    scale_by: str,
    baseline: str = "mean",
    credit: str = "reward",
    length_PG: Array | None = None,
    greedy_P: Array | None = None,
) -> Array:
    """Reward of each completion relative to the others of its prompt, [P, G].

    `scale_by` "none": in reward units (Liu et al. 2025, arXiv:2503.20783, "Dr. GRPO"). "std": in
    standard deviations of the G rewards themselves (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2), and 0 where that is at most 1e-4. "sample_std": divided by the sample estimate, of
    G - 1, plus 1e-4, as TRL 1.16 does. "batch_std": divided by the sample deviation of all rewards
    of the batch, plus 1e-4 (Lite PPO, arXiv:2508.08221; TRL's "batch"). "mean": divided by the
    group's mean reward, and 0 where that is not above 0 (MaxRL, arXiv:2602.02710). A group of equal
    rewards gives exact zeros, except with the baselines "greedy" and "none".

    `baseline` is what is subtracted: "mean" of the group; "leave_one_out", the mean of the others
    (RLOO: Ahmadian et al. 2024, arXiv:2402.14740); "length_weighted", the mean weighted by
    `length_PG` (OPO, arXiv:2505.23585); "greedy", the reward of a greedy completion of the same
    prompt (ReMax: Li et al. 2023, arXiv:2310.10505), where an unknown one gives zeros; "none",
    nothing (REINFORCE: Williams 1992).

    `credit` "best": the best completion gets its lead over the second best, the others 0 (Tang et
    al. 2025, arXiv:2503.19595; verl's "grpo_passk"); `baseline` is not read. "rank": rewards
    count by their order alone, 1 for the least in the group; equal ones share their mean rank.
    """
    reward_PG = reward_PG.astype(jnp.promote_types(reward_PG.dtype, jnp.float32))
    if credit == "rank":
        reward_PG = _ranks(reward_PG)
    known_PG = ~jnp.isnan(reward_PG)
    first_P1, shift_PG, count_P1, mean_P1, adv_PG = _centred(reward_PG, known_PG)
    square_P1 = (adv_PG**2).sum(axis=1, keepdims=True)
    if credit == "best":
        adv_PG = _lead_of_best(shift_PG, known_PG)
    elif baseline == "leave_one_out":
        adv_PG *= count_P1 / jnp.maximum(count_P1 - 1, 1)
    elif baseline == "length_weighted":
        length_PG = jnp.where(known_PG, length_PG, 0).astype(shift_PG.dtype)
        total_P1 = jnp.maximum(length_PG.sum(axis=1, keepdims=True), 1)
        weighted_P1 = (length_PG * shift_PG).sum(axis=1, keepdims=True) / total_P1
        adv_PG = jnp.where(known_PG, shift_PG - weighted_P1, 0.0)
    elif baseline == "greedy":
        greedy_P1 = greedy_P[:, None].astype(reward_PG.dtype)
        adv_PG = jnp.where(known_PG & ~jnp.isnan(greedy_P1), reward_PG - greedy_P1, 0.0)
    elif baseline == "none":
        adv_PG = jnp.where(known_PG, reward_PG, 0.0)
    if scale_by == "std":  # the floor: rounding alone gives equal rewards a std near 1e-7
        std_P1 = jnp.sqrt(square_P1 / count_P1)
        adv_PG = jnp.where(std_P1 > 1e-4, adv_PG / jnp.maximum(std_P1, 1e-4), 0.0)
    if scale_by == "sample_std":
        adv_PG /= jnp.sqrt(square_P1 / jnp.maximum(count_P1 - 1, 1)) + 1e-4
    if scale_by == "batch_std":
        row = reward_PG.reshape(1, -1), known_PG.reshape(1, -1)
        _, _, count_11, _, centred_1B = _centred(*row)
        adv_PG /= jnp.sqrt((centred_1B**2).sum() / jnp.maximum(count_11 - 1, 1)) + 1e-4
    if scale_by == "mean":  # the floor: rounding may leave a mean of 0 just above it
        size_P1 = jnp.where(known_PG, jnp.abs(reward_PG), 0.0).sum(axis=1, keepdims=True) / count_P1
        mean_P1, least_P1 = first_P1 + mean_P1, 1e-6 * size_P1
        adv_PG = jnp.where(mean_P1 > least_P1, adv_PG / jnp.where(mean_P1 > 0, mean_P1, 1), 0.0)
    return adv_PG


def kl_of_completions(logp_PGC: Array, ref_logp_PGC: Array, action_PGC: Array) -> Array:
    """Sum of k1, policy minus reference, over the action tokens of each completion, nats [P, G].

    Subtracted from the reward, its coefficient times this has on average the gradient of
    KL(policy ‖ reference) (Ziegler et al. 2019, arXiv:1909.08593, equation 2).
    """
    return jnp.where(action_PGC, logp_PGC - ref_logp_PGC, 0.0).sum(axis=-1)


def _centred(reward_PG: Array, known_PG: Array) -> tuple[Array, ...]:
    """A known reward of each group; rewards minus it; their count and mean; rewards minus the mean.

    The rewards are relative to one of them, since the mean of equal numbers rounds, and the mean of
    zeros does not. Unknown ones are 0.
    """
    first_P1 = jnp.take_along_axis(reward_PG, known_PG.argmax(axis=1, keepdims=True), axis=1)
    shift_PG = jnp.where(known_PG, reward_PG - first_P1, 0.0)
    count_P1 = jnp.maximum(known_PG.sum(axis=1, keepdims=True), 1)
    mean_P1 = shift_PG.sum(axis=1, keepdims=True) / count_P1
    return first_P1, shift_PG, count_P1, mean_P1, jnp.where(known_PG, shift_PG - mean_P1, 0.0)


def _ranks(reward_PG: Array) -> Array:
    """Rank of each reward in its group, from 1, the mean rank for equal ones.

    NaN where unknown, and of the only known one.
    """
    others_PGG, own_PGG = reward_PG[:, None, :], reward_PG[:, :, None]
    below_PG = (own_PGG > others_PGG).sum(axis=2)
    equal_PG = (own_PGG == others_PGG).sum(axis=2).astype(reward_PG.dtype)  # itself included
    rank_PG = below_PG + (equal_PG + 1) / 2
    unknown_PG = jnp.isnan(reward_PG)
    alone_P1 = (~unknown_PG).sum(axis=1, keepdims=True) < 2
    return jnp.where(unknown_PG | alone_P1, jnp.nan, rank_PG)


def _lead_of_best(reward_PG: Array, known_PG: Array) -> Array:
    """For the first of the best completions its reward minus the second best; 0 for the others."""
    reward_PG = jnp.where(known_PG, reward_PG, -jnp.inf)
    is_best_PG = jnp.arange(reward_PG.shape[1])[None] == reward_PG.argmax(axis=1, keepdims=True)
    best_P1 = reward_PG.max(axis=1, keepdims=True)
    second_P1 = jnp.where(is_best_PG, -jnp.inf, reward_PG).max(axis=1, keepdims=True)
    return jnp.where(is_best_PG & (second_P1 > -jnp.inf), best_P1 - second_P1, 0.0)


def _whitened(adv_PG: Array, known_PG: Array) -> Array:
    """Advantages minus their mean over the batch, divided by their sample deviation plus 1e-4.

    As TRL 1.16 does, for GDPO and with `normalize_advantages` of its RLOO: the batch is one group.
    """
    row_1B = jnp.where(known_PG, adv_PG, jnp.nan).reshape(1, -1)
    return group_advantages(row_1B, scale_by="sample_std").reshape(adv_PG.shape)


def _whitened_by_token(adv_PG: Array, known_PG: Array, action_PGC: Array) -> Array:
    """Advantages minus their mean over the batch's tokens, divided by their deviation over them.

    Every action token has the advantage of its completion (REINFORCE++: Hu 2025, arXiv:2501.03262).
    The deviation is sqrt(variance + 1e-8), as in verl, the variance that of the tokens themselves.
    """
    count_PG = jnp.where(known_PG, action_PGC.sum(axis=-1), 0).astype(adv_PG.dtype)
    total = jnp.maximum(count_PG.sum(), 1)
    adv_PG -= adv_PG.ravel()[(count_PG > 0).argmax()]  # as in `_centred`
    adv_PG = jnp.where(known_PG, adv_PG - (count_PG * adv_PG).sum() / total, 0.0)
    return adv_PG / jnp.sqrt((count_PG * adv_PG**2).sum() / total + 1e-8)


def evaluate(
    options: Mapping[str, Any] | str,
    reward_PGR: np.ndarray,
    weights_R: np.ndarray,
    *,
    length_PG: np.ndarray | None = None,
    greedy_PR: np.ndarray | None = None,
    action_PGC: np.ndarray | None = None,
    logp_PGC: np.ndarray | None = None,
    ref_logp_PGC: np.ndarray | None = None,
) -> np.ndarray:
    """Advantages [P, G] of rewards by function, to check a number by hand: NumPy in, NumPy out.

    `options`: a preset's name, or the fields of `AdvantageOptions` by name, as in
    `config.algorithm`; the others have their defaults, and those of the loss are not read. The
    other arguments are those of `advantages`. Computed in the precision of the rewards, float64 for
    integers. Raises ValueError for an unknown name or value, and for an array that an option needs
    and that is None. Options that contradict each other are refused by `config.rules`, not here.
    """
    names = [f.name for f in dataclasses.fields(AdvantageOptions) if f.name != "weights"]
    options = objective.row(options)
    if options.get("critic"):
        raise ValueError(
            "critic = True has advantages of tokens, from a critic's values: see `gae.evaluate`."
        )
    options = {name: value for name, value in options.items() if name in names}
    for name, value in options.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name} = {value!r} must be one of {', '.join(CHOICES[name])}.")
    reward_PGR, weights_R = np.asarray(reward_PGR), np.asarray(weights_R)
    precision = np.result_type(reward_PGR, np.float32)
    chosen = AdvantageOptions(**options, weights=tuple(weights_R.tolist()))
    total = lambda x: None if x is None else _weighted_sum(np.asarray(x, precision), weights_R)  # noqa: E731
    log_probs = logp_PGC, ref_logp_PGC
    given = {
        "greedy": greedy_PR if chosen.reads_each_reward else total(greedy_PR),
        "length_PG": length_PG,
        "action_PGC": action_PGC,
        "log_probs": None if any(x is None for x in log_probs) else log_probs,
    }
    _refuse_missing(chosen, given)
    with jax.enable_x64(precision == np.float64):
        reward = reward_PGR.astype(precision) if chosen.reads_each_reward else total(reward_PGR)
        given = jax.tree.map(jnp.asarray, given)
        return np.asarray(advantages(chosen, jnp.asarray(reward), **given))


def _weighted_sum(reward_R: np.ndarray, weights_R: np.ndarray) -> np.ndarray:
    """The weighted sum over the last axis, an unknown reward as 0; NaN where all are unknown."""
    total = np.nansum(reward_R * weights_R.astype(reward_R.dtype), axis=-1)
    return np.where(np.isnan(reward_R).all(axis=-1), np.nan, total).astype(reward_R.dtype)


def _refuse_missing(options: AdvantageOptions, given: dict[str, Any]) -> None:
    """Raises ValueError if an array that an option reads is None."""
    by_token, with_kl = options.whiten == "tokens", options.reads_log_probs
    needs = (
        (options.baseline == "greedy", 'baseline = "greedy"', "greedy", "greedy_PR"),
        (options.baseline == "length_weighted", 'baseline = "length_weighted"', "length_PG", ""),
        (by_token, 'whiten = "tokens"', "action_PGC", ""),
        (with_kl, 'kl_in = "reward"', "action_PGC", ""),
        (with_kl, 'kl_in = "reward"', "log_probs", "logp_PGC and ref_logp_PGC"),
    )
    for is_read, option, name, argument in needs:
        if is_read and given[name] is None:
            raise ValueError(f"{option} needs {argument or name}.")
