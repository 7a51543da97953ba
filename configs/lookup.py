"""Looking things up, on a laptop CPU with no download.

    python -m grpo_jax.train --config configs/lookup.py

A question about a made corpus is answered by searching it; held-out questions are about other
corpora, so that nothing can be learned by heart. Of 256 of them the greedy answer is right for 1 %
at the start, and for all after 25 steps (seed 0). The control searches corpora of which
nothing is true:

    --config.environment.classes="('grpo_jax.environments.tasks.lookup:FalseSearch',)"
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.data.task = "lookup"
    c.data.num_train = 20_000
    c.data.num_eval = 256
    c.data.max_prompt_tokens = 12
    c.rewards.names = ("exact_answer",)
    c.rewards.weights = (1.0,)

    c.environment.classes = ("grpo_jax.environments.tasks.lookup:Search",)
    c.environment.max_turns = 3
    c.environment.turn_tokens = 16
    c.environment.observation_tokens = 16

    c.model.num_layers = 2
    c.model.width = 128
    c.model.mlp_width = 384
    c.model.num_heads = 4
    c.model.num_kv_heads = 2

    c.sft.num_steps = 2000
    c.sft.batch = 64
    c.sft.learning_rate = 1e-3
    c.sft.max_tokens = 40

    c.batch.prompts = 32
    c.batch.group = 8
    c.rollout.max_tokens = 40
    c.rollout.compact = False  # a rollout takes less time than compiling for smaller batches
    c.algorithm.kl_coef = 0.001
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 5
    c.optim.schedule = "linear"
    c.optim.end_fraction = 0.1
    c.loop.num_steps = 50

    c.evaluation.every_steps = 25
    c.evaluation.num_samples = 4
    c.checkpoint.every_steps = 25
    return c
