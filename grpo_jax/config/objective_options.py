"""The options of the objective: sections `algorithm` and `rollout_correction`."""

from __future__ import annotations

from grpo_jax.algorithm.presets import PRESETS
from grpo_jax.config.adaptive_options import ADAPTIVE
from grpo_jax.config.advantage_options import ADVANTAGE
from grpo_jax.config.critic_options import CRITIC, GAE
from grpo_jax.config.schema import (
    ANY,
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    choice,
    flag,
    number,
    several,
)

# fmt: off
OBJECTIVE = (
    choice("algorithm.preset", "", {
               "": "the options as they stand",
               **{name: "" for name in PRESETS}},
           "An objective by its name (docs/objectives.md), which sets those options of this "
           "section that have their defaults"),
    number("algorithm.num_iterations", 1, COUNT, "passes", "Passes over a step's rollouts"),
    *ADVANTAGE,
    choice("algorithm.ratio", "token", {
               "token": "of each token",
               "sequence": "of each completion: the geometric mean over its tokens (GSPO)",
               "geometric": "the same, of ratios that are clipped token by token, on one side "
                            "(GMPO): algorithm.clip_low and clip_high are in nats"},
           "Probability under the policy over that before the rollout's first update"),
    choice("algorithm.surrogate", "clip", {
               "clip": "the smaller of ratio and clipped ratio times advantage (PPO, GRPO)",
               "cispo": "log-probability, weighed by the ratio up to algorithm.ratio_cap (CISPO)",
               "sapo": "a sigmoid of the ratio (SAPO)",
               "vespo": "log-probability, weighed by a function of the completion's ratio (VESPO)",
               "tv_mask": "log-probability, weighed by the ratio; tokens count whose probability "
                          "moved by at most algorithm.mask_threshold (DPPO)",
               "kl_mask": "the same by the KL of one token against all others (DPPO)",
               "sampler_mask": "the ratio to the sampler, of tokens whose probability differs from "
                               "the sampler's by at most algorithm.mask_threshold (IPO)",
               "reinforce": "log-probability: no ratio (REINFORCE)"},
           "What is maximized, times the advantage"),
    number("algorithm.clip_low", 0.2, FRACTION, "",
           "The ratio is clipped to [1 - clip_low, 1 + clip_high]"),
    number("algorithm.clip_high", 0.2, NOT_NEGATIVE, "", "See algorithm.clip_low"),
    number("algorithm.dual_clip_ratio", 0.0, POSITIVE, "",
           "Bound of the ratio that is not clipped, of both signs of the advantage; TRL's delta",
           special={0: "none"}),
    number("algorithm.dual_clip_loss", 0.0, POSITIVE, "",
           "Bound of a token's loss with a negative advantage, in units of that; verl's "
           "clip_ratio_c",
           special={0: "none"}),
    number("algorithm.ratio_cap", 5.0, Range(at_least=1), "", "Largest weight of \"cispo\"",
           why="a cap below 1 would make every loss smaller, on-policy too. 5 is usual"),
    number("algorithm.sapo_positive", 1.0, POSITIVE, "",
           "Temperature of \"sapo\" where the advantage is positive"),
    number("algorithm.sapo_negative", 1.05, POSITIVE, "", "The same where it is negative"),
    several("algorithm.vespo_positive", (2.0, 3.0), "numbers k, lambda",
            "Weight w^k exp(lambda (1 - w)) of \"vespo\" where the advantage is positive"),
    several("algorithm.vespo_negative", (3.0, 2.0), "numbers k, lambda",
            "The same where it is negative"),
    number("algorithm.mask_threshold", 0.2, POSITIVE, "",
           "Largest change of a probability, or KL, of the surrogates with a mask"),
    number("algorithm.max_sequence_drift", 0.0, POSITIVE, "nats a token",
           "Completions with a negative advantage that have become less likely since they were "
           "sampled, by more than this on average, are left out (off-policy sequence mask)",
           special={0: "none is"}),
    number("algorithm.kl_coef", 0.0, NOT_NEGATIVE, "",
           "Weight of the KL to the frozen reference, per token",
           special={0: "no reference is kept"}),
    choice("algorithm.kl_estimator", "k3", {
               "k1": "l, the difference of log-probabilities, policy - reference: as a loss its "
                     "gradient is 0 on average",
               "k2": "l squared / 2: gradient of KL(policy || reference)",
               "k3": "exp(-l) - 1 + l: gradient of KL(reference || policy)",
               "k3_ratio": "k3 times the token's ratio to the old policy: gradient of "
                           "KL(policy || reference), as in TRL"},
           "The KL of a token, and the divergence whose gradient it has"),
    number("algorithm.entropy_coef", 0.0, ANY, "",
           "Weight of the entropy bonus, per token; below 0 it is a penalty"),
    choice("algorithm.normalizer", "token", {
               "token": "mean over the tokens of the batch (DAPO)",
               "sequence": "mean over completions of the mean over their tokens (GRPO)",
               "sequence_sum": "mean over completions of the sum over their tokens (LUSPO)",
               "constant": "sum over tokens, divided by completions times rollout.max_tokens "
                           "(Dr. GRPO)"},
           "How the losses of tokens are averaged"),
    flag("algorithm.mask_truncated", False,
         "Leave completions that reached the token limit out of the loss"),
    *ADAPTIVE,
    *GAE,
    *CRITIC,
    choice("rollout_correction.level", "none", {
               "none": "no correction",
               "token": "the ratio of each token",
               "sequence": "the ratio of each completion, the product of those of its tokens"},
           "Ratio of policy to sampler that weights the loss, where the sampler has other weights, "
           "another precision or is a step old. loop.async_rollouts needs it"),
    choice("rollout_correction.bound", "truncate", {
               "truncate": "it becomes that bound",
               "mask": "it becomes 0: the token or completion does not count"},
           "What is done with a ratio above the cap, or below the floor"),
    number("rollout_correction.cap", 2.0, POSITIVE, "", "The largest ratio that is kept"),
    number("rollout_correction.floor", 0.0, POSITIVE, "",
           "The smallest ratio that is kept; one below becomes the floor, or 0 with bound \"mask\"",
           special={0: "any"}),
)
# fmt: on
