"""A hybrid solves what GRPO alone cannot begin: no completion of the start earns a reward.

    python -m grpo_jax.train --config configs/hybrid.py
    python -m grpo_jax.train --config configs/hybrid.py --config.hybrid.method=  # the control

About four minutes on two CPU cores, with no download. A model of 0.4 million parameters first
imitates sloppy students, who never write the marker that the reward reads the answer after. So
rewards are 0, and GRPO learns nothing in 60 steps. HPT (arXiv:2509.04419) takes the demonstration
of a problem while no completion passes, and the rewards once some do: 97.7 % of 512 held-out sums
(seed 0).
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.data.task = "unseen_form"
    c.data.num_train = 20_000
    c.data.num_eval = 512
    c.data.max_prompt_tokens = 16
    c.rewards.names = ("exact_answer",)
    c.rewards.weights = (1.0,)

    c.model.num_layers = 2
    c.model.width = 128
    c.model.mlp_width = 384
    c.model.num_heads = 4
    c.model.num_kv_heads = 2

    c.sft.num_steps = 1000
    c.sft.batch = 64
    c.sft.learning_rate = 2e-3
    c.sft.max_tokens = 40

    c.hybrid.method = "hpt"
    c.batch.prompts = 32
    c.batch.group = 7
    c.rollout.max_tokens = 40
    c.rollout.compact = False  # a rollout takes less time than compiling for smaller batches
    c.optim.learning_rate = 3e-4
    c.optim.warmup_steps = 5
    c.optim.schedule = "linear"
    c.optim.end_fraction = 0.1
    c.loop.num_steps = 60

    c.evaluation.every_steps = 20
    c.checkpoint.every_steps = 20
    return c
