"""GRPO on GSM8K, adapters of Qwen2.5-3B-Instruct (LoRA), on one GPU of 24 GB.

    python -m grpo_jax.train --config recipes/gsm8k_3b_lora_24gb

Rank 16 on all dense layers, at ten times the learning rate of full fine-tuning. Its largest program,
in the evaluation, needs 22.0 GiB by a plan (docs/recipes.md). No score is recorded for this config
yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.model.path = "Qwen/Qwen2.5-3B-Instruct"
    c.lora.rank = 16
    c.optim.learning_rate = 1e-5
    c.model.remat = "full"
    c.batch.microbatch = 1
    c.rollout.num_slots = 128
    return c
