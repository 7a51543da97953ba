"""GRPO on a real pretrained story teller, with a reward that reads its text.

    python -m grpo_jax.train --config configs/stories.py --config.model.path=DIR_OR_ID

takes any small Llama, Qwen or Mistral model that continues "Once upon a time"; it was made for
stories260K, a Llama of 260 thousand parameters trained on TinyStories (karpathy/tinyllamas). The
reward is the share of four words that a story mentions, less a penalty for repeated phrases. With
that model it rises from 0.07 to 0.85 in under three minutes on two CPU cores.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.model.path = "stories260K"  # a folder of yours
    c.data.task = "stories"
    c.data.num_train = 4096
    c.data.num_eval = 64
    c.data.max_prompt_tokens = 48
    c.rewards.names = ("mentions(words=['friend', 'share', 'hug', 'smiled'])", "repetition_penalty")
    c.rewards.weights = (1.0, 1.0)
    c.batch.prompts = 16
    c.batch.group = 8
    c.rollout.max_tokens = 128
    c.algorithm.kl_coef = 0.05
    c.optim.learning_rate = 5e-4
    c.optim.warmup_steps = 5
    c.loop.num_steps = 60
    c.evaluation.every_steps = 20
    c.checkpoint.every_steps = 20
    c.logging.samples_every_steps = 20
    return c
