"""What a run optimizes, told as formulas: which of the definitions that the field has is in force.

`docs/definitions.md` sets each beside TRL's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import derived

_BASELINE = {
    "mean": "mean of its group",
    "leave_one_out": "mean of the others of its group",
    "length_weighted": "mean of its group weighted by length",
    "greedy": "reward of the greedy completion",
}
_SCALE = {
    "std": "the group's standard deviation, 0 where that is <= 1e-4",
    "sample_std": "(the group's sample standard deviation + 1e-4)",
    "batch_std": "(the sample standard deviation of the step's rewards + 1e-4)",
    "mean": "mean of its group, 0 where that is <= 0",
}
_WHITEN = {
    "completions": "minus the mean of the step's completions, / (their sample standard deviation "
    "+ 1e-4)",
    "tokens": "minus the mean of the step's tokens, / their standard deviation",
}
_KL = {
    "reference_policy": "k3, gradient of KL(reference || policy)",
    "policy_reference": "r k3, gradient of KL(policy || reference)",
}
_MEAN = {
    "token": "mean over an update's tokens",
    "sequence": "mean over an update's completions of the mean over their tokens",
    "constant": "sum over an update's tokens / (completions x {max_tokens})",
}


def _advantage(config: ConfigDict) -> str:
    """The formula of the advantage."""
    algorithm, whiten = config.algorithm, config.algorithm.whiten
    value = "rank of the reward" if algorithm.credit == "rank" else "reward"
    if derived.has_kl_in_reward(config):
        kl = f"{algorithm.kl_coef:g} sum of log(policy / reference)"
        value = f"rank of (reward - {kl})" if algorithm.credit == "rank" else f"{value} - {kl}"
    formula = value
    if algorithm.credit == "best":
        formula = f"{value} - second best of its group for the best, 0 for the others"
    elif algorithm.baseline != "none":
        formula = f"{value} - {_BASELINE[algorithm.baseline]}"
    if algorithm.scale_by != "none":
        formula = f"({formula}) / {_SCALE[algorithm.scale_by]}"
    if algorithm.aggregate == "each":
        formula = f"weighted sum over the rewards of [{formula}]"
        whiten = "completions" if whiten == "none" else whiten
    return formula if whiten == "none" else f"{formula}; then {_WHITEN[whiten]}"


def in_force(config: ConfigDict) -> list[str]:
    """Three lines: the advantage A, the loss of a token with ratio r, and the optimizer."""
    algorithm, optim, rollout = config.algorithm, config.optim, config.rollout
    correction = config.rollout_correction
    weight = "" if correction.level == "none" else "w "
    loss = f"-{weight}min(r A, clip(r, {1 - algorithm.clip_low:g}, {1 + algorithm.clip_high:g}) A)"
    if algorithm.kl_coef and not derived.has_kl_in_reward(config):
        loss += f" + {algorithm.kl_coef:g} ({_KL[algorithm.kl_gradient]})"
    if algorithm.entropy_coef:
        loss += f" - {algorithm.entropy_coef:g} entropy"
    loss += f", {_MEAN[algorithm.normalizer].format(max_tokens=rollout.max_tokens)}"
    if weight:
        bound = {"truncate": "at most", "mask": "0 above"}[correction.bound]
        loss += f"; w = policy / sampler of each {correction.level}, {bound} {correction.cap:g}"
    if algorithm.mask_truncated:
        loss += "; completions that were cut are left out"
    cuts = [f"top_k {rollout.top_k}"] * (rollout.top_k > 0)
    cuts += [f"top_p {rollout.top_p:g}"] * (rollout.top_p < 1)
    if cuts:
        loss += f"; probabilities within {' and '.join(cuts)}"
    rate = f"learning rate {optim.learning_rate:g}"
    if optim.warmup_steps:
        rate += f" after {optim.warmup_steps} updates"
    if optim.schedule != "constant":
        updates, epochs = derived.num_updates_per_step(config), config.loop.num_epochs
        last = (
            f"the end of {epochs:g} epochs"
            if epochs
            else f"update {config.loop.num_steps * updates}"
        )
        end = optim.end_fraction * optim.learning_rate
        rate += f", {optim.schedule} to {end:g} at {last}"
    return [
        f"Advantage A: {_advantage(config)}",
        f"Loss: {loss}",
        f"AdamW({optim.beta1:g}, {optim.beta2:g}), {rate}",
    ]
