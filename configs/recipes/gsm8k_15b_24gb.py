"""GRPO on GSM8K, Qwen2.5-1.5B-Instruct, on one GPU of 24 GB.

    python -m grpo_jax.train --config recipes/gsm8k_15b_24gb

Weights and moments are bfloat16, and the optimizer waits in host memory. Planned peak: 18.4 GiB
(docs/recipes.md). No score is recorded for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.model.param_dtype = "bfloat16"  # rounded by chance: docs/precision.md
    c.optim.moments_dtype = "bfloat16"
    c.model.remat = "full"
    c.model.offload_reference = True
    c.batch.microbatch = 1
    c.rollout.num_slots = 256
    c.optim.offload = True
    return c
