"""GRPO on GSM8K, Qwen2.5-7B-Instruct, on two GPUs of 80 GB in one machine.

    python -m grpo_jax.train --config recipes/gsm8k_7b_2x80gb

Weights are bfloat16, moments 8 bits, and the optimizer and the reference wait in host memory.
Planned peak: 60.4 GiB on each (docs/recipes.md). No score is recorded for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.model.path = "Qwen/Qwen2.5-7B-Instruct"
    c.model.param_dtype = "bfloat16"  # rounded by chance: docs/precision.md
    c.optim.moments_dtype = "int8"
    c.optim.offload = True
    c.model.remat = "full"
    c.model.offload_reference = True
    c.batch.microbatch = 2
    c.rollout.num_slots = 256
    c.mesh.data = 1
    c.mesh.fsdp = 2
    return c
