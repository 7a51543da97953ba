"""The rules that the options of the objective follow together."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config.options import BY_NAME
from grpo_jax.messages.values import shown

# The options that one surrogate alone reads.
_OWN = {
    "clip": ("clip_low", "clip_high", "dual_clip_ratio", "dual_clip_loss"),
    "cispo": ("ratio_cap",),
    "sapo": ("sapo_positive", "sapo_negative"),
    "vespo": ("vespo_positive", "vespo_negative"),
    "_mask": ("mask_threshold",),
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for options of the objective that contradict each other."""
    algorithm, correction = config.algorithm, config.rollout_correction
    surrogate, ratio = algorithm.surrogate, algorithm.ratio
    for owner, names in _OWN.items():
        for name in names:
            if not surrogate.endswith(owner) and not _is_default(config, f"algorithm.{name}"):
                who = "the surrogates with a mask" if owner == "_mask" else f'"{owner}"'
                raise ValueError(
                    f"algorithm.{name} = {shown(algorithm[name])} is of {who}, and "
                    f"algorithm.surrogate = {surrogate!r} does not read it. Leave it at "
                    f"{shown(BY_NAME[f'algorithm.{name}'].default)}, or set algorithm.surrogate."
                )
    if ratio == "sequence" and surrogate not in ("clip", "cispo", "sapo"):
        raise ValueError(
            f'algorithm.ratio = "sequence" goes with algorithm.surrogate = "clip", "cispo" or '
            f'"sapo", and it is {surrogate!r}, which has a ratio of its own. Set algorithm.ratio '
            'to "token".'
        )
    if ratio == "geometric" and surrogate != "clip":
        raise ValueError(
            'algorithm.ratio = "geometric" clips each token (GMPO), and algorithm.surrogate = '
            f'{surrogate!r} does not clip. Set it to "clip", or algorithm.ratio to "token".'
        )
    for name in ("dual_clip_ratio", "dual_clip_loss"):
        if algorithm[name] and ratio == "geometric":
            raise ValueError(
                f"algorithm.{name} = {algorithm[name]} bounds ratios of tokens or completions, "
                f'and algorithm.ratio = "geometric" has bounds of its own. Set algorithm.{name} '
                "to 0."
            )
    if 0 < algorithm.dual_clip_ratio <= 1 + algorithm.clip_high:
        raise ValueError(
            f"algorithm.dual_clip_ratio = {algorithm.dual_clip_ratio} must be above 1 + "
            f"algorithm.clip_high = {1 + algorithm.clip_high:g}, which clips before it, or 0."
        )
    if 0 < algorithm.dual_clip_loss <= 1:
        raise ValueError(
            f"algorithm.dual_clip_loss = {algorithm.dual_clip_loss} must be above 1, which is the "
            "ratio of a token that has not changed. 3 is usual; 0 is no bound."
        )
    _check_pairs(config)
    if correction.level == "none" and correction.floor:
        raise ValueError(
            f"rollout_correction.floor = {correction.floor:g} bounds the weights of a correction, "
            'and rollout_correction.level = "none" has none. Set that, or the floor to 0.'
        )
    if correction.floor >= correction.cap:
        raise ValueError(
            f"rollout_correction.floor = {correction.floor:g} must be below rollout_correction.cap "
            f"= {correction.cap:g}."
        )
    if surrogate == "sampler_mask" and correction.level != "none":
        raise ValueError(
            'algorithm.surrogate = "sampler_mask" has the ratio to the sampler itself, so that '
            f"rollout_correction.level = {correction.level!r} would count it twice. Set that to "
            '"none".'
        )
    if surrogate == "vespo" and correction.level == "sequence":
        raise ValueError(
            'algorithm.surrogate = "vespo" multiplies the weights of tokens by itself. Set '
            'rollout_correction.level to "token" or "none".'
        )


def _check_pairs(config: ConfigDict) -> None:
    for name in ("vespo_positive", "vespo_negative"):
        value = config.algorithm[name]
        numbers = all(type(x) in (int, float) and x >= 0 for x in value)
        if len(value) != 2 or not numbers:
            raise ValueError(
                f"algorithm.{name} = {shown(value)} must be two numbers of at least 0, k and "
                "lambda, such as (2.0, 3.0)."
            )


def _is_default(config: ConfigDict, name: str) -> bool:
    section, _, leaf = name.rpartition(".")
    return config[section][leaf] == BY_NAME[name].default
