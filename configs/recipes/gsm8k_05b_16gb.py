"""GRPO on GSM8K, Qwen2.5-0.5B-Instruct, on one GPU of 16 GB.

    python -m grpo_jax.train --config recipes/gsm8k_05b_16gb

As configs/gsm8k.py, but for what is kept and how much is computed at once. Planned peak: 13.0 GiB
(docs/recipes.md). No score is recorded for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.model.remat = "full"
    c.batch.microbatch = 1
    c.rollout.num_slots = 256
    return c
