"""The smallest run with every part of a run: a new model, several updates per rollout, a KL term.

    python -m grpo_jax.train --config tests/helpers/tiny_config.py

It takes seconds and learns nothing; the tests of whole runs use it.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.data.task = "arithmetic"
    c.data.num_train = 40
    c.data.num_eval = 8
    c.data.max_prompt_tokens = 16
    c.rewards.names = ("exact_answer", "answer_format")
    c.rewards.weights = (1.0, 0.5)
    c.model.num_layers = 1
    c.model.width = 32
    c.model.mlp_width = 48
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.sft.num_steps = 3
    c.sft.batch = 8
    c.sft.max_tokens = 56
    c.sft.warmup_steps = 1
    c.batch.prompts = 4
    c.batch.group = 4
    c.batch.minibatches = 2
    c.rollout.max_tokens = 8
    c.algorithm.num_iterations = 2
    c.algorithm.kl_coef = 0.05
    c.optim.learning_rate = 1e-3
    c.loop.num_steps = 4
    c.evaluation.every_steps = 2
    c.checkpoint.every_steps = 2
    c.logging.samples_every_steps = 1
    return c
