"""A small student learns from the quickstart's model, on completions that it draws itself.

    python -m grpo_jax.train --config configs/quickstart.py --workdir runs/quickstart
    python -m grpo_jax.train --config configs/distill.py --workdir runs/distill

A few minutes on two CPU cores after the first command, with no download. The student has a third
of the teacher's parameters, and first imitates the sloppy students of the task: it answers 8 % of
the held-out sums. Then it minimizes the divergence from the teacher at each token of its own
completions, which falls from 0.62 to 0.22 nats, and answers 58 % (seed 0). No reward counts: the
one here, with a weight of 0, only measures the accuracy.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.distill.teacher = "runs/quickstart/export"
    c.data.task = "arithmetic"
    c.data.num_train = 20_000
    c.data.num_eval = 512
    c.data.max_prompt_tokens = 16
    c.rewards.names = ("exact_answer",)
    c.rewards.weights = (0.0,)

    c.model.num_layers = 2
    c.model.width = 64
    c.model.mlp_width = 256
    c.model.num_heads = 4
    c.model.num_kv_heads = 2

    c.sft.num_steps = 600
    c.sft.batch = 64
    c.sft.learning_rate = 2e-3
    c.sft.max_tokens = 40

    c.batch.prompts = 64
    c.batch.group = 2
    c.rollout.max_tokens = 40
    c.rollout.compact = False  # a rollout takes less time than compiling for smaller batches
    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 5
    c.optim.schedule = "linear"
    c.optim.end_fraction = 0.1
    c.loop.num_steps = 150

    c.evaluation.every_steps = 50
    c.checkpoint.every_steps = 50
    return c
