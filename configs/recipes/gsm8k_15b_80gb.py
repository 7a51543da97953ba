"""GRPO on GSM8K, Qwen2.5-1.5B-Instruct, on one GPU of 80 GB.

    python -m grpo_jax.train --config recipes/gsm8k_15b_80gb

Float32 weights and moments. Planned peak: 55.9 GiB (docs/recipes.md). No score is recorded
for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.batch.microbatch = 2
    return c
