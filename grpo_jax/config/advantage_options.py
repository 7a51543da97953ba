"""The options of advantages, a part of `options.TABLE`; `algorithm/advantages.py` computes them."""

from __future__ import annotations

from grpo_jax.config.schema import choice

# fmt: off
ADVANTAGE = (
    choice("algorithm.baseline", "mean", {
               "mean": "the mean of its group",
               "leave_one_out": "the mean of the others of its group (RLOO)",
               "length_weighted": "the mean of its group, each weighted by its length (OPO)",
               "greedy": "the reward of a greedy completion of the prompt, one more completion a "
                         "prompt (ReMax); needs algorithm.scale_by \"none\"",
               "none": "nothing (REINFORCE); needs algorithm.scale_by \"none\""},
           "What is subtracted from the reward of a completion"),
    choice("algorithm.scale_by", "std", {
               "none": "nothing: advantages have the reward's unit",
               "std": "the group's standard deviation",
               "sample_std": "the larger one that is estimated from a sample, with G - 1, as in "
                             "TRL",
               "batch_std": "that of all rewards of the step (Lite PPO)",
               "mean": "the group's mean reward (MaxRL)"},
           "What advantages are divided by"),
    choice("algorithm.aggregate", "sum", {
               "sum": "the advantage of the weighted sum of the rewards",
               "each": "the weighted sum of the advantages of each reward, whitened over the "
                       "step's completions (GDPO)"},
           "How several rewards become one advantage"),
    choice("algorithm.credit", "reward", {
               "reward": "as the reward functions give it",
               "best": "only for the best of the group, its lead over the second best (pass@k)",
               "rank": "as its rank in the group; equal rewards share their mean rank"},
           "How a completion's reward counts in its group"),
    choice("algorithm.whiten", "none", {
               "none": "no",
               "completions": "minus their mean over the step's completions, divided by their "
                              "deviation",
               "tokens": "the same over the step's tokens (REINFORCE++)"},
           "Normalize advantages over the whole step, at last"),
    choice("algorithm.kl_in", "loss", {
               "loss": "in the loss, per token, as algorithm.kl_estimator says",
               "reward": "in the reward: the sum over a completion's tokens of log-probabilities "
                         "of policy minus reference (k1), times algorithm.kl_coef, is subtracted"},
           "Where the KL to the reference counts"),
)
