"""The rules that the options of advantages and adaptive coefficients follow together."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.config.options import BY_NAME
from grpo_jax.messages.values import shown


def check(config: ConfigDict) -> None:
    """Raises ValueError for choices of the advantage that contradict each other."""
    _check_adaptive(config)
    algorithm, group = config.algorithm, config.batch.group
    baseline, scale_by, credit = algorithm.baseline, algorithm.scale_by, algorithm.credit
    alone, with_kl = baseline in ("none", "greedy"), derived.has_kl_in_reward(config)
    stated = lambda *names: " and ".join(f"algorithm.{n} = {shown(algorithm[n])}" for n in names)  # noqa: E731
    refusals = (
        (
            group == 1 and not (alone and credit == "reward"),
            f"batch.group = {group} must be at least 2: advantages are relative to the other "
            'completions of a prompt. 8 is usual. Or set algorithm.baseline to "none" or "greedy".',
        ),
        (
            alone and scale_by != "none",
            f"{stated('baseline', 'scale_by')}: equal rewards would be divided by next to nothing, "
            'for only a baseline from the rewards themselves makes them 0. Set scale_by = "none"; '
            'algorithm.whiten = "completions" divides by a deviation.',
        ),
        (
            credit == "best" and baseline != "mean",
            f"{stated('credit', 'baseline')}: the best completion is compared with the second "
            'best, and with no baseline. Leave baseline at "mean".',
        ),
        (
            credit == "rank" and baseline == "greedy",
            f"{stated('credit', 'baseline')}: the reward of the greedy completion has no rank in "
            "the group. Set another baseline.",
        ),
        (
            credit != "reward" and scale_by == "mean",
            f"{stated('credit', 'scale_by')}: the mean reward is no scale of what counts then. "
            'Set credit = "reward", or another scale_by.',
        ),
        (
            baseline == "greedy" and config.loop.async_rollouts,
            f"{stated('baseline')} and loop.async_rollouts = True: the greedy completions of a "
            "step ahead are in no checkpoint. Set one of them otherwise.",
        ),
        (
            with_kl and baseline == "greedy",
            f"{stated('kl_in', 'baseline')}: the greedy completion's reward would be without its "
            'KL. Set kl_in = "loss", or another baseline.',
        ),
        (
            with_kl and algorithm.aggregate == "each",
            f"{stated('kl_in', 'aggregate')}: each reward is normalized by itself, and the KL is "
            'none of them. Set kl_in = "loss", or aggregate = "sum".',
        ),
        (
            with_kl and algorithm.kl_estimator != BY_NAME["algorithm.kl_estimator"].default,
            f"{stated('kl_in', 'kl_estimator')}: kl_estimator is of the loss. In the reward the "
            "KL's gradient is always that of KL(policy || reference). Leave kl_estimator.",
        ),
    )
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(message)


def _check_adaptive(config: ConfigDict) -> None:
    algorithm = config.algorithm
    for name in ("kl_target", "reference_refresh_steps"):
        if algorithm[name] and not algorithm.kl_coef:
            raise ValueError(
                f"algorithm.{name} = {algorithm[name]} is of the KL to a reference, and "
                "algorithm.kl_coef = 0 keeps none. Set that above 0, such as to 0.001, or "
                f"algorithm.{name} = 0."
            )
    if algorithm.kl_target and algorithm.kl_in == "reward":
        raise ValueError(
            f"algorithm.kl_target = {algorithm.kl_target} adapts the KL's weight in the loss, and "
            'algorithm.kl_in = "reward" has it in the reward. Set kl_in = "loss", or kl_target = 0.'
        )
    completions = config.batch.prompts * config.batch.group
    if algorithm.kl_target and 5 * algorithm.kl_horizon <= completions:
        raise ValueError(
            f"algorithm.kl_horizon = {algorithm.kl_horizon} lets a step of {completions} "
            "completions lower the KL coefficient to 0 or below. Make it more than a fifth of "
            f"them, {completions / 5:g}; 10000 is usual."
        )
    if algorithm.reference_refresh_steps and (config.lora.rank or config.lora.path):
        raise ValueError(
            f"algorithm.reference_refresh_steps = {algorithm.reference_refresh_steps}, but the "
            "reference of low-rank adapters is the model without them, of which there is no second "
            "copy to move. Set it to 0, or train all weights (lora.rank = 0)."
        )
    low, high = algorithm.entropy_coef_min, algorithm.entropy_coef_max
    if algorithm.entropy_target and not low <= algorithm.entropy_coef <= high:
        raise ValueError(
            f"algorithm.entropy_coef = {algorithm.entropy_coef}, from which "
            "algorithm.entropy_target adapts it, must be from algorithm.entropy_coef_min = "
            f"{low} to algorithm.entropy_coef_max = {high}."
        )
