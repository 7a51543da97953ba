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
    "k1": "k1, gradient 0 on average",
    "k2": "k2, gradient of KL(policy || reference)",
    "k3": "k3, gradient of KL(reference || policy)",
    "k3_ratio": "r k3, gradient of KL(policy || reference)",
}
_MEAN = {
    "token": "mean over an update's tokens",
    "sequence": "mean over an update's completions of the mean over their tokens",
    "sequence_sum": "mean over an update's completions of the sum over their tokens",
    "constant": "sum over an update's tokens / (completions x {max_tokens})",
}


def _surrogate(algorithm: ConfigDict) -> str:
    """What is maximized at a token, with ratio r and advantage A; its completion has ratio s."""
    ratio = "s" if algorithm.ratio == "sequence" else "r"
    threshold = f"{algorithm.mask_threshold:g}"
    if algorithm.surrogate == "cispo":
        return f"min({ratio}, {algorithm.ratio_cap:g}) A log p, the minimum fixed"
    if algorithm.surrogate == "sapo":
        by_sign = f"t = {algorithm.sapo_positive:g} or with A < 0 {algorithm.sapo_negative:g}"
        return f"(4 / t) sigmoid(t ({ratio} - 1)) A, {by_sign}"
    if algorithm.surrogate == "vespo":
        (k, decay), (k_neg, decay_neg) = algorithm.vespo_positive, algorithm.vespo_negative
        by_sign = f"(k, l) = ({k:g}, {decay:g}) or with A < 0 ({k_neg:g}, {decay_neg:g})"
        return f"w^k exp(l (1 - w)) A log p, w = product of r, {by_sign}"
    if algorithm.surrogate == "tv_mask":
        return f"min(r, 20) A log p, r fixed, 0 where p moved along A by more than {threshold}"
    if algorithm.surrogate == "kl_mask":
        return f"min(r, 20) A log p, r fixed, 0 where p moved along A by a KL above {threshold}"
    if algorithm.surrogate == "sampler_mask":
        return f"r A, r = policy / sampler, 0 where their p differ by more than {threshold}"
    if algorithm.surrogate == "reinforce":
        return "A log p"
    low, high = algorithm.clip_low, algorithm.clip_high
    if algorithm.ratio == "geometric":
        return (
            f"A times the geometric mean of r, at most exp({high:g}), with A < 0 at least "
            f"exp(-{low:g})"
        )
    first = ratio
    if algorithm.dual_clip_ratio:
        first = f"min({ratio}, {algorithm.dual_clip_ratio:g})"
    told = f"min({first} A, clip({ratio}, {1 - low:g}, {1 + high:g}) A)"
    if algorithm.dual_clip_loss:
        told = f"max({told}, {algorithm.dual_clip_loss:g} A where A < 0)"
    if ratio == "s":
        told += ", s = geometric mean of r"
    return told


def _advantage(config: ConfigDict) -> str:
    """The formula of the advantage."""
    algorithm, whiten = config.algorithm, config.algorithm.whiten
    if algorithm.critic:
        return _of_critic(config)
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


def _of_critic(config: ConfigDict) -> str:
    """The formula of a token's advantage from the values V of a critic."""
    algorithm = config.algorithm
    reward = "the reward at the last token"
    if derived.has_kl_in_reward(config):
        reward += f" - {algorithm.kl_coef:g} log(policy / reference) at each"
    decay = f"{algorithm.gae_lambda:g}"
    if algorithm.gae_length_scale:
        decay = f"(1 - 1 / ({algorithm.gae_length_scale:g} tokens of its completion), at least 0)"
    discount = "" if algorithm.discount == 1 else f"{algorithm.discount:g} "
    told = f"d + {discount}{decay} next A of each token, d = r + {discount}next V - V, r = {reward}"
    return f"{told}; then {_WHITEN[algorithm.whiten]}" if algorithm.whiten != "none" else told


def in_force(config: ConfigDict) -> list[str]:
    """Three lines: the advantage A, the loss of a token with ratio r, and the optimizer.

    A fourth, before that of the optimizer, says what changes in the loss during the run, if
    anything does.
    """
    algorithm, optim, rollout = config.algorithm, config.optim, config.rollout
    correction = config.rollout_correction
    weight = "" if correction.level == "none" else "w "
    loss = f"-{weight}{_surrogate(algorithm)}"
    if algorithm.kl_coef and not derived.has_kl_in_reward(config):
        coef = "b" if algorithm.kl_target else f"{algorithm.kl_coef:g}"
        loss += f" + {coef} ({_KL[algorithm.kl_estimator]})"
    if algorithm.entropy_coef or algorithm.entropy_target:
        coef = "c" if algorithm.entropy_target else f"{algorithm.entropy_coef:g}"
        loss += f" - {coef} entropy"
    loss += f", {_MEAN[algorithm.normalizer].format(max_tokens=rollout.max_tokens)}"
    if weight:
        bound = {"truncate": "at most", "mask": "0 above"}[correction.bound]
        loss += f"; w = policy / sampler of each {correction.level}, {bound} {correction.cap:g}"
        if correction.floor:
            bound = {"truncate": "at least", "mask": "0 below"}[correction.bound]
            loss += f", {bound} {correction.floor:g}"
    if algorithm.max_sequence_drift:
        loss += (
            "; completions with A < 0 are left out that became less likely by more than "
            f"{algorithm.max_sequence_drift:g} nats a token"
        )
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
        f"Advantage A: {_advantage(config)}",
        f"Loss: {loss}",
        *_critics_loss(config),
        *_changes(config),
        f"AdamW({optim.beta1:g}, {optim.beta2:g}), {rate}",
    ]


def _critics_loss(config: ConfigDict) -> list[str]:
    """A line on what a critic learns; none without one."""
    if not config.algorithm.critic:
        return []
    asked = config.critic
    square = "(V - R)^2"
    if asked.clip:
        square = f"max({square}, (clip(V, old V +- {asked.clip:g}) - R)^2)"
    alone = f"; alone for {asked.first_steps} steps" if asked.first_steps else ""
    return [
        f"Critic's loss: {asked.loss_coef / 2:g} {square}, R = V + advantage with lambda "
        f"{asked.gae_lambda:g}, mean over an update's tokens; learning rate "
        f"{asked.learning_rate:g}{alone}"
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
