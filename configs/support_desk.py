"""A clerk at a support desk, on a laptop CPU with no download.

    python -m grpo_jax.train --config configs/support_desk.py

A scripted customer wants to return or cancel an order, and tells the number only when asked. The
clerk looks the order up, obeys the rules, and has what it does confirmed. An episode counts if the
database is right in the end. The control shows another order than the one that is looked up:

    --config.environment.classes="('grpo_jax.environments.tasks.support_desk:DeafSupportDesk',)"
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.data.task = "support_desk"
    c.data.num_train = 20_000
    c.data.num_eval = 256
    c.data.max_prompt_tokens = 36
    c.rewards.names = ()
    c.rewards.weights = ()

    c.environment.classes = ("grpo_jax.environments.tasks.support_desk:SupportDesk",)
    c.environment.max_turns = 8
    c.environment.turn_tokens = 16
    c.environment.observation_tokens = 16

    c.model.num_layers = 2
    c.model.width = 128
    c.model.mlp_width = 384
    c.model.num_heads = 4
    c.model.num_kv_heads = 2

    c.sft.num_steps = 2800  # fewer do not always teach to copy the item that the screen shows
    c.sft.batch = 32
    c.sft.learning_rate = 2e-3
    c.sft.max_tokens = 72

    c.batch.prompts = 32
    c.batch.group = 8
    c.rollout.max_tokens = 72
    c.rollout.compact = False  # a rollout takes less time than compiling for smaller batches
    c.algorithm.kl_coef = 0.001
    c.optim.learning_rate = 3e-4
    c.optim.warmup_steps = 5
    c.optim.schedule = "linear"
    c.optim.end_fraction = 0.1
    c.loop.num_steps = 90

    c.evaluation.every_steps = 30
    c.evaluation.num_samples = 4
    c.checkpoint.every_steps = 30
    return c
