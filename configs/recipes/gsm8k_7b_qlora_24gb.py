"""GRPO on GSM8K, adapters of Qwen2.5-7B-Instruct in 4 bits (QLoRA), on one GPU of 24 GB.

    python -m grpo_jax.train --config recipes/gsm8k_7b_qlora_24gb

Rank 16 on all dense layers beside a base in NF4, at ten times the learning rate of full
fine-tuning. Rollouts decode each kernel for each token (docs/lora.md). Its largest program, in the
evaluation, needs 20.8 GiB by a plan (docs/recipes.md). No score is recorded for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.model.path = "Qwen/Qwen2.5-7B-Instruct"
    c.lora.rank = 16
    c.lora.base_dtype = "nf4"
    c.optim.learning_rate = 1e-5
    c.model.remat = "full"
    c.batch.microbatch = 1
    c.rollout.num_slots = 128
    return c
