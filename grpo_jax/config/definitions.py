"""What a run optimizes, told as formulas: which of the definitions that the field has is in force.

`docs/definitions.md` sets each beside TRL's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import derived

_ADVANTAGE = {
    "none": "reward - mean of its group",
    "std": "(reward - mean of its group) / the group's standard deviation, 0 where that is <= 1e-4",
    "sample_std": "(reward - mean of its group) / (the group's sample standard deviation + 1e-4)",
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


def in_force(config: ConfigDict) -> list[str]:
    """Three lines: the advantage A, the loss of a token with ratio r, and the optimizer.

    A fourth, before that of the optimizer, says what changes in the loss during the run, if
    anything does.
    """
    algorithm, optim, rollout = config.algorithm, config.optim, config.rollout
    correction = config.rollout_correction
    weight = "" if correction.level == "none" else "w "
    loss = f"-{weight}min(r A, clip(r, {1 - algorithm.clip_low:g}, {1 + algorithm.clip_high:g}) A)"
    if algorithm.kl_coef:
        coef = "b" if algorithm.kl_target else f"{algorithm.kl_coef:g}"
        loss += f" + {coef} ({_KL[algorithm.kl_gradient]})"
    if algorithm.entropy_coef or algorithm.entropy_target:
        coef = "c" if algorithm.entropy_target else f"{algorithm.entropy_coef:g}"
        loss += f" - {coef} entropy"
    loss += f", {_MEAN[algorithm.normalizer].format(max_tokens=rollout.max_tokens)}"
    if weight:
        bound = {"truncate": "at most", "mask": "0 above"}[correction.bound]
        loss += f"; w = policy / sampler of each {correction.level}, {bound} {correction.cap:g}"
    if algorithm.top_entropy_share < 1:
        loss += (
            f"; A = 0 but for the {100 * algorithm.top_entropy_share:g} % of a rollout's tokens "
            "that have the highest entropy"
        )
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
        f"Advantage A: {_ADVANTAGE[algorithm.scale_by]}",
        f"Loss: {loss}",
        *_changes(config),
        f"AdamW({optim.beta1:g}, {optim.beta2:g}), {rate}",
    ]


def _changes(config: ConfigDict) -> list[str]:
    """A line on what changes in the loss after a step; none if nothing does."""
    algorithm, told = config.algorithm, []
    if algorithm.kl_target:
        share = config.batch.prompts * config.batch.group / algorithm.kl_horizon
        told.append(
            f"b from {algorithm.kl_coef:g}, times 1 + {share:g} clip(KL / "
            f"{algorithm.kl_target:g} - 1, -0.2, 0.2)"
        )
    if algorithm.entropy_target:
        told.append(
            f"c from {algorithm.entropy_coef:g}, {algorithm.entropy_coef_delta:g} up if the "
            f"entropy is <= {algorithm.entropy_target:g}, else down and left out of the next step, "
            f"within [{algorithm.entropy_coef_min:g}, {algorithm.entropy_coef_max:g}]"
        )
    if algorithm.reference_refresh_steps:
        mix, every = algorithm.reference_mix, algorithm.reference_refresh_steps
        told.append(
            f"reference = {mix:g} policy + {1 - mix:g} reference"
            + (f" every {every} steps" if every > 1 else "")
        )
    return [f"After each step: {'; '.join(told)}"] if told else []
