"""The options of a critic, a part of `options.TABLE`: of `algorithm`, and section `critic`."""

from __future__ import annotations

from grpo_jax.config.schema import COUNT, NOT_NEGATIVE, POSITIVE, Range, flag, number, text

_SHARE = Range(at_least=0, at_most=1)

# fmt: off
GAE = (
    flag("algorithm.critic", False,
         "A critic learns the value of each token's state, and advantages are those of tokens "
         "(PPO, docs/ppo.md). Needs algorithm.baseline and algorithm.scale_by \"none\""),
    number("algorithm.discount", 1.0, _SHARE, "", "Discount of what follows a token (gamma)"),
    number("algorithm.gae_lambda", 0.95, _SHARE, "",
           "Lambda of the advantages: 1 sums all rewards that follow, 0 trusts the critic"),
    number("algorithm.gae_length_scale", 0.0, POSITIVE, "",
           "Lambda of a completion's advantages by its length, 1 - 1 / (scale * tokens), in place "
           "of algorithm.gae_lambda (VAPO, there 0.05)", special={0: "the same for all"}),
)
CRITIC = (
    text("critic.path", "", "Hugging Face folder, folder of PEFT, or hub id",
         "Where the critic begins: a reward model, also one of adapters and a head, or a language "
         "model, which gets a new head",
         special={"": "as the policy, with a new head"}),
    number("critic.lora_rank", -1, COUNT, "",
           "Rank of the critic's own adapters, which learn in place of its weights, with the "
           "targets, alpha and base_dtype of `lora`; its head learns whole",
           special={-1: "adapters like the policy's, or those of critic.path, if it has any",
                    0: "no adapters: all weights learn"}),
    number("critic.learning_rate", 1e-5, POSITIVE, "", "Constant, after warm-up"),
    number("critic.warmup_steps", 0, NOT_NEGATIVE, "updates",
           "Linear warm-up of the learning rate"),
    number("critic.weight_decay", 0.0, NOT_NEGATIVE, "", "Of matrices; norms and biases have none"),
    number("critic.max_grad_norm", 1.0, POSITIVE, "", "Largest global norm of the gradient",
           special={0: "no clipping"}),
    number("critic.first_steps", 0, NOT_NEGATIVE, "steps",
           "First steps of the run, in which the critic learns and the policy does not"),
    number("critic.gae_lambda", 0.95, _SHARE, "",
           "Lambda of the returns that the critic learns; 1 in VAPO"),
    number("critic.clip", 0.2, POSITIVE, "",
           "Values count in the loss as moved by at most this in a rollout's updates",
           special={0: "no clip"}),
    number("critic.loss_coef", 0.5, POSITIVE, "",
           "Weight of the critic's loss. It matters beside critic.max_grad_norm alone"),
)
# fmt: on
