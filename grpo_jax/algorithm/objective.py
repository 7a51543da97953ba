"""What a policy loss consists of: a ratio, a surrogate, a normalizer, a KL term, and their bounds.

The parts are independent, and `presets.py` names the combinations that papers use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import struct

from grpo_jax.algorithm.presets import ADVANTAGE_OPTIONS, PRESETS
from grpo_jax.structs import Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The constants of the loss; `config.algorithm` documents each by the same name."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    normalizer: str = "token"
    max_tokens: int = 1  # completion limit, the "constant" normalizer's length of every sequence
    importance_level: str = "none"  # or "token" or "sequence"; `config.rollout_correction`
    importance_bound: str = "truncate"  # or "mask"
    importance_cap: float = 2.0
    importance_floor: float = 0.0
    kl_estimator: str = "k3"
    ratio: str = "token"  # or "sequence" or "geometric"
    surrogate: str = "clip"
    dual_clip_ratio: float = 0.0
    dual_clip_loss: float = 0.0
    ratio_cap: float = 5.0  # of "cispo"
    sapo_positive: float = 1.0  # temperatures of "sapo", by the sign of the advantage
    sapo_negative: float = 1.05
    vespo_positive: tuple[float, ...] = (2.0, 3.0)  # k and lambda of "vespo"
    vespo_negative: tuple[float, ...] = (3.0, 2.0)
    mask_threshold: float = 0.2  # of the surrogates with a mask
    max_sequence_drift: float = 0.0  # nats a token; 0: no mask of whole sequences

    @property
    def sums_sequences(self) -> bool:
        """Whether the correction needs a whole completion's log-probability before its loss."""
        return self.importance_level == "sequence"

    @property
    def needs_completions(self) -> bool:
        """Whether a token's loss depends on the current policy's other tokens of its completion."""
        return self.ratio != "token" or self.surrogate == "vespo" or self.max_sequence_drift > 0

    @staticmethod
    def of(options: Mapping[str, Any]) -> Objective:
        """The objective of a config's options, by their names; missing ones have their defaults.

        Names of the section `algorithm` stand alone, such as "clip_low"; others in full, such as
        "rollout.max_tokens". Options that are no part of the loss are not read.
        """
        known = {option: options[option] for option in OPTIONS if option in options}
        return Objective(**{OPTIONS[option]: value for option, value in known.items()})


_ELSEWHERE = {
    "max_tokens": "rollout.max_tokens",
    "importance_level": "rollout_correction.level",
    "importance_bound": "rollout_correction.bound",
    "importance_cap": "rollout_correction.cap",
    "importance_floor": "rollout_correction.floor",
}
# The field of each option.
OPTIONS = {_ELSEWHERE.get(f.name, f.name): f.name for f in dataclasses.fields(Objective)}


def row(options: Mapping[str, Any] | str) -> dict[str, Any]:
    """The options of a preset, or `options` with those of its key "preset" beneath.

    Raises ValueError for a preset or an option that does not exist.
    """
    given = {"preset": options} if isinstance(options, str) else dict(options)
    name = given.pop("preset", "")
    if name and name not in PRESETS:
        raise ValueError(f"preset = {name!r} is none of {', '.join(PRESETS)}.")
    known = (*OPTIONS, *ADVANTAGE_OPTIONS)
    for option in given:
        if option not in known:
            raise ValueError(f"{option!r} is no option of an objective: {', '.join(known)}.")
    return {**PRESETS.get(name, {}), **given}


@struct.dataclass
class TokenTerms:
    """What the loss of each token knows besides its log-probability; arrays of one shape.

    If the objective `needs_completions`, the last axis holds the tokens of one completion.
    """

    advantage: Array
    sampler_logp: Array
    old_logp: Array | None  # None: one update, so the current
    ref_logp: Array | None  # None: no KL term
    sequence_log_ratio: Array | None  # of its whole completion; None: the loss reads none
    action: Array | None = None  # bool: tokens of the loss; None: the loss reads none
    kl_coef: Array | None = None  # None: the objective's
    entropy_coef: Array | None = None  # None: the objective's
    policy_weight: Array | None = None  # of the surrogate, bool or float32; None: 1
