"""GRPO on GSM8K, Qwen2.5-0.5B-Instruct, on one GPU of 24 GB.

    python -m grpo_jax.train --config recipes/gsm8k_05b_24gb

As configs/gsm8k.py, but for how much is computed at once. Planned peak with two prompts at once:
22.0 GiB (docs/recipes.md); here it is one. No score is recorded for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.batch.microbatch = 1
    return c
