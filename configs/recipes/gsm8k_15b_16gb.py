"""GRPO on GSM8K, Qwen2.5-1.5B-Instruct, on one GPU of 16 GB.

    python -m grpo_jax.train --config recipes/gsm8k_15b_16gb

As on 24 GB, with half of the completions decoded at once. Peak by the plans: 14.4 of 14.7 GiB
(docs/recipes.md). No score is recorded for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("recipes/gsm8k_15b_24gb", [])
    c.rollout.num_slots = 128
    return c
