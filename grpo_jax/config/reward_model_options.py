"""The options of training a reward model: section `reward_model` of `options.TABLE`."""

from __future__ import annotations

from grpo_jax.config.given_options import schedule_options
from grpo_jax.config.schema import NOT_NEGATIVE, number

# fmt: off
REWARD_MODEL = (
    *schedule_options("reward_model", "pair", "pairs",
                      "Updates of a reward model, by grpo_jax.reward_model",
                      learning_rate=1e-4, warmup_steps=0, weight_decay=0.0),
    number("reward_model.centre_coef", 0.0, NOT_NEGATIVE, "",
           "Weight of the square of the sum of a pair's rewards, which keeps their mean at 0: 0.01 "
           "in the paper; TRL's center_rewards_coefficient"),
)
# fmt: on
