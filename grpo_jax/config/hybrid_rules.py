"""The rules that the options of hybrids and of distillation follow together."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.config.options import BY_NAME
from grpo_jax.messages.values import shown

# The methods that read an option; the others leave it at its default.
_OWN = {
    "shaping": ("luffy",),
    "pass_reward": ("hpt", "positive_nll"),
    "max_pass_rate": ("hpt",),
    "mix_peak": ("chord", "chord_phi"),
    "mix_valley": ("chord", "chord_phi"),
    "mix_warmup_steps": ("chord", "chord_phi"),
    "mix_decay_steps": ("chord", "chord_phi"),
    "hint_high": ("uft",),
    "hint_low": ("uft",),
    "hint_steps": ("uft",),
    "nll_coef": ("chord", "chord_phi", "srft", "hpt", "uft", "positive_nll"),
    "missing": ("luffy", "chord", "chord_phi", "srft", "hpt", "uft"),
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for options of hybrids or of distillation that contradict others."""
    _check_own(config)
    refusals = (*_of_hybrid(config), *_of_distillation(config))
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(message)


def _check_own(config: ConfigDict) -> None:
    hybrid, distill = config.hybrid, config.distill
    for name, methods in _OWN.items():
        default = BY_NAME[f"hybrid.{name}"].default
        if hybrid[name] != default and hybrid.method not in methods:
            raise ValueError(
                f"hybrid.{name} = {shown(hybrid[name])} is of hybrid.method = "
                f"{' or '.join(map(shown, methods))}, and hybrid.method = {shown(hybrid.method)} "
                f"does not read it. Leave it at {shown(default)}, or set hybrid.method."
            )
    for name in ("loss", "coef", "beta"):
        default = BY_NAME[f"distill.{name}"].default
        if distill[name] != default and not distill.teacher:
            raise ValueError(
                f"distill.{name} = {shown(distill[name])} needs a teacher, and distill.teacher = "
                f'"" names none. Set that, or leave distill.{name} at {shown(default)}.'
            )
    if distill.beta != BY_NAME["distill.beta"].default and distill.loss != "divergence":
        raise ValueError(
            f'distill.beta = {distill.beta:g} is of distill.loss = "divergence", and '
            f"distill.loss = {shown(distill.loss)} does not read it. Leave it at "
            f"{BY_NAME['distill.beta'].default:g}."
        )


def _of_hybrid(config: ConfigDict) -> list[tuple[bool, str]]:
    hybrid, algorithm = config.hybrid, config.algorithm
    method = derived.hybrid_method(config)
    if method is None:
        return []
    named = f"hybrid.method = {shown(hybrid.method)}"
    return [
        (
            config.prompts.drop_equal_groups and bool(method.given),
            f"{named} teaches what the policy cannot do yet, and prompts.drop_equal_groups = True "
            "drops just those groups. Set one of them otherwise.",
        ),
        (
            algorithm.top_entropy_share < 1,
            f"{named} and algorithm.top_entropy_share = {algorithm.top_entropy_share:g}: the share "
            "would be counted among tokens that the policy did not draw, too. Set it to 1.",
        ),
        (
            not config.rewards.names,
            f"{named} needs rewards: rewards.names = () has none. Name at least one, or train "
            "on the demonstrations alone with grpo_jax.sft.",
        ),
        (
            method.mixes and hybrid.mix_valley > hybrid.mix_peak,
            f"hybrid.mix_valley = {hybrid.mix_valley:g} must be at most hybrid.mix_peak = "
            f"{hybrid.mix_peak:g}, from which the share falls.",
        ),
        (
            method.given == "prefix" and hybrid.hint_low > hybrid.hint_high,
            f"hybrid.hint_low = {hybrid.hint_low:g} must be at most hybrid.hint_high = "
            f"{hybrid.hint_high:g}, from which the share falls.",
        ),
        (
            method.given == "prefix" and algorithm.baseline == "greedy",
            f'{named} and algorithm.baseline = "greedy": the greedy completion would have no hint, '
            "and be compared with those that have one. Set another baseline.",
        ),
        (
            algorithm.critic and bool(method.given),
            f"{named} and algorithm.critic = True: a critic learns what the policy's own "
            "completions are worth, not those of others. Set that to False, or hybrid.method = "
            '"positive_nll".',
        ),
        (
            bool(config.distill.teacher),
            f"{named} and distill.teacher = {shown(config.distill.teacher)} each change the loss. "
            "Set one of them.",
        ),
    ]


def _of_distillation(config: ConfigDict) -> list[tuple[bool, str]]:
    distill, algorithm, rollout = config.distill, config.algorithm, config.rollout
    if not distill.teacher:
        return []
    named = f"distill.teacher = {shown(distill.teacher)}"
    by_completion = algorithm.ratio != "token" or algorithm.max_sequence_drift > 0
    by_completion |= algorithm.surrogate == "vespo"
    return [
        (
            rollout.top_k > 0 or rollout.top_p < 1,
            f"{named} compares whole distributions, and rollout.top_k = {rollout.top_k} or "
            f"rollout.top_p = {rollout.top_p:g} cuts them. Set these to 0 and 1.",
        ),
        (
            distill.loss == "divergence" and by_completion,
            f'{named} with distill.loss = "divergence" computes the loss of each token in one '
            "sweep, and algorithm.ratio, algorithm.surrogate or algorithm.max_sequence_drift "
            'needs whole completions. Set those to token-wise ones, or distill.loss to "reward".',
        ),
        (
            config.prompts.drop_equal_groups,
            f"{named} teaches in groups of equal rewards too, and prompts.drop_equal_groups = True "
            "drops them. Set that to False.",
        ),
        (
            algorithm.critic,
            f"{named} and algorithm.critic = True: the teacher tells of each token what a critic "
            "would have to learn. Set that to False.",
        ),
        (
            not config.rewards.names and derived.follows_pass_rates(config),
            f"{named} without rewards has no pass rates, and prompts.outside_weight or "
            "prompts.replay_share follows them. Leave both at their defaults.",
        ),
    ]
