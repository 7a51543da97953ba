"""GRPO on a problem file of your own, from a Hugging Face model, on one accelerator.

    python -m grpo_jax.train --config configs/qwen_jsonl.py --config.data.path=train.jsonl \\
        --config.data.eval_path=test.jsonl

Each line of the files is an object such as {"prompt": "...", "answer": "72"}; `prompt` may be a
list of chat messages, and every further column reaches the reward functions by its name. Parquet
and other files, folders and hub datasets do as well. The sizes fit a GPU of 80 GB. No score is
recorded for this config yet.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"
    c.data.path = "train.jsonl"
    c.data.max_prompt_tokens = 512
    c.batch.prompts = 64
    c.batch.group = 8
    c.batch.microbatch = 4
    c.rollout.max_tokens = 1024
    c.algorithm.kl_coef = 0.001
    c.optim.learning_rate = 1e-6
    c.loop.num_steps = 200
    c.evaluation.every_steps = 20
    c.checkpoint.every_steps = 20
    return c
