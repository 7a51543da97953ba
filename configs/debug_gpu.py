"""A few steps of a small new model on one device, to see where something goes wrong.

    python -m grpo_jax.train --config configs/debug_gpu.py --workdir runs/debug

NaN checks at every operation, each step's completions and held-out accuracy on the terminal, step 2
in a trace, and every program compiled anew. Hardware: one GPU, or two CPU cores in about two
minutes. It is too short to learn anything. Another model: --config.model.path=DIR with
--config.sft.num_steps=0.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.data.task = "arithmetic"
    c.data.num_train = 64
    c.data.num_eval = 8
    c.data.max_prompt_tokens = 32
    c.rewards.names = ("exact_answer", "answer_format")
    c.rewards.weights = (1.0, 0.5)
    c.model.num_layers = 2
    c.model.width = 64
    c.model.mlp_width = 96
    c.sft.num_steps = 20
    c.sft.batch = 16
    c.sft.warmup_steps = 5
    c.sft.max_tokens = 96
    c.batch.prompts = 4
    c.batch.group = 4
    c.rollout.max_tokens = 32
    c.algorithm.kl_coef = 0.01  # so that the reference is computed too
    c.optim.learning_rate = 1e-4
    c.guards.max_skipped = 1  # the first update that is not finite ends the run
    c.loop.num_steps = 3
    c.evaluation.every_steps = 1
    c.checkpoint.every_steps = 0
    c.checkpoint.export = False
    c.logging.samples_every_steps = 1
    c.logging.num_samples = 2
    c.profile.steps = (2, 2)
    c.debug.nans = True
    c.mesh.data = 1
    c.compile_cache = False
    return c
