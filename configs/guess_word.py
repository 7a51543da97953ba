"""A word game, on a laptop CPU with no download.

    python -m grpo_jax.train --config configs/guess_word.py

A hidden word is found by its place in the alphabet, in five guesses: no tool, the environment
answers what is said. The control gives answers that mean nothing:

    --config.environment.classes="('grpo_jax.environments.tasks.guess_word:DeafGuessWord',)"
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.data.task = "guess_word"
    c.data.num_train = 20_000
    c.data.num_eval = 256
    c.data.max_prompt_tokens = 10
    c.rewards.names = ()
    c.rewards.weights = ()

    c.environment.classes = ("grpo_jax.environments.tasks.guess_word:GuessWord",)
    c.environment.max_turns = 5
    c.environment.turn_tokens = 4
    c.environment.observation_tokens = 8

    c.model.num_layers = 2
    c.model.width = 128
    c.model.mlp_width = 384
    c.model.num_heads = 4
    c.model.num_kv_heads = 2

    c.sft.num_steps = 800
    c.sft.batch = 64
    c.sft.learning_rate = 2e-3
    c.sft.max_tokens = 24

    c.batch.prompts = 32
    c.batch.group = 8
    c.rollout.max_tokens = 24
    c.rollout.compact = False  # a rollout takes less time than compiling for smaller batches
    c.algorithm.kl_coef = 0.001
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 5
    c.optim.schedule = "linear"
    c.optim.end_fraction = 0.1
    c.loop.num_steps = 60

    c.evaluation.every_steps = 30
    c.evaluation.num_samples = 4
    c.checkpoint.every_steps = 30
    return c
