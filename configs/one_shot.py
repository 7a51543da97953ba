"""Reinforcement learning on one training problem, on a laptop CPU with no download.

    python -m grpo_jax.train --config configs/one_shot.py

The model is that of configs/quickstart.py: after its supervised start it mostly guesses. Then GRPO
asks one sum alone, in every group of every step, and 512 others are evaluated every 10 steps:
what it learns from one problem shows in `eval/accuracy`, while `accuracy` is that of the one.

Wang et al. 2025, "Reinforcement Learning for Reasoning in Large Language Models with One Training
Example", arXiv:2504.20571, has 128 copies of one problem in a step with 8 completions each, a KL
term of 0.001 and an entropy bonus of 0.001. `data.subset` chooses the problem.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("quickstart", [])
    c.data.subset = (0,)
    c.data.repeat = 16
    c.batch.prompts = 16
    c.algorithm.entropy_coef = 0.001
    c.optim.schedule = "constant"
    c.loop.num_steps = 120
    c.evaluation.every_steps = 10
    c.evaluation.num_samples = 0
    return c
