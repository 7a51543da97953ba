"""A tool found by reinforcement learning, on a laptop CPU with no download.

    python -m grpo_jax.train --config configs/calculator.py

A model of 0.4 million parameters first imitates proud students: most guess the product of two
numbers, the others call a tool that multiplies. GRPO with a reward for right answers teaches it to
call the tool, with the right numbers: of 256 held-out products its greedy answer is right for none
at the start, and for 99.6 to 100 % at the end (seeds 0 to 2). A control has a tool that returns
noise:

    --config.environment.tools="()" \\
    --config.environment.classes="('grpo_jax.environments.tasks.calculator:NoisyCalculator',)"
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.data.task = "calculator"
    c.data.num_train = 20_000
    c.data.num_eval = 256
    c.data.max_prompt_tokens = 8
    c.rewards.names = ("exact_answer",)
    c.rewards.weights = (1.0,)

    c.environment.tools = ("grpo_jax.environments.tasks.calculator:multiply",)
    c.environment.max_turns = 3
    c.environment.turn_tokens = 16
    c.environment.observation_tokens = 8

    c.model.num_layers = 2
    c.model.width = 128
    c.model.mlp_width = 384
    c.model.num_heads = 4
    c.model.num_kv_heads = 2

    c.sft.num_steps = 2400  # fewer do not always teach to copy the tool's result
    c.sft.batch = 32
    c.sft.learning_rate = 2e-3
    c.sft.max_tokens = 32

    c.batch.prompts = 32
    c.batch.group = 8
    c.rollout.max_tokens = 32
    c.rollout.compact = False  # a rollout takes less time than compiling for smaller batches
    c.algorithm.kl_coef = 0.001
    c.optim.learning_rate = 3e-4
    c.optim.warmup_steps = 5
    c.optim.schedule = "linear"
    c.optim.end_fraction = 0.1
    c.loop.num_steps = 60

    c.evaluation.every_steps = 20
    c.evaluation.num_samples = 4
    c.checkpoint.every_steps = 20
    return c
