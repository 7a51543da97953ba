"""The options of what changes in the objective during a run, a part of `options.TABLE`."""

from __future__ import annotations

from grpo_jax.config.schema import COUNT, NOT_NEGATIVE, POSITIVE, Range, number

_SHARE = Range(above=0, at_most=1)

# fmt: off
ADAPTIVE = (
    number("algorithm.kl_target", 0.0, POSITIVE, "nats per token",
           "KL to the reference (policy/kl) that is aimed at: after each step algorithm.kl_coef, "
           "which is the first value, is multiplied by 1 + clip(KL / target - 1, -0.2, 0.2) * "
           "completions of the step / algorithm.kl_horizon",
           special={0: "the coefficient is fixed"}),
    number("algorithm.kl_horizon", 10_000, COUNT, "completions", "See algorithm.kl_target"),
    number("algorithm.entropy_target", 0.0, POSITIVE, "nats per token",
           "Entropy (policy/entropy) below which a bonus is given: after each step "
           "algorithm.entropy_coef, which is the first value, grows by "
           "algorithm.entropy_coef_delta if the entropy is at most this, else it falls by it and "
           "the next step has no bonus. Choose it near the entropy of the first steps",
           special={0: "the coefficient is fixed"}),
    number("algorithm.entropy_coef_delta", 0.005, POSITIVE, "", "See algorithm.entropy_target"),
    number("algorithm.entropy_coef_min", 0.0, NOT_NEGATIVE, "",
           "Least coefficient with algorithm.entropy_target"),
    number("algorithm.entropy_coef_max", 1.0, NOT_NEGATIVE, "",
           "Largest coefficient with algorithm.entropy_target"),
    number("algorithm.reference_refresh_steps", 0, COUNT, "steps",
           "Steps after which the reference is replaced, each time, by algorithm.reference_mix "
           "times the policy and the rest of the reference (TR-DPO)",
           special={0: "never: the reference is the model as it was given"}),
    number("algorithm.reference_mix", 0.6, _SHARE, "", "See algorithm.reference_refresh_steps"),
    number("algorithm.top_entropy_share", 1.0, _SHARE, "",
           "Share of a rollout's tokens, those of highest entropy, that carry the policy gradient; "
           "KL and entropy bonus are of all tokens. 0.2 in the paper",
           special={1: "all tokens"}),
)
