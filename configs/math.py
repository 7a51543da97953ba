"""GRPO on MATH, competition mathematics, from Qwen2.5-0.5B-Instruct on one GPU of 80 GB.

    python -m grpo_jax.train --config configs/math.py

The hub's dataset is downloaded once; `--config.data.path=../math` reads a local folder instead,
with train.jsonl and test.jsonl or as `save_to_disk` wrote it. Three passes over 7,500 problems;
greedy accuracy on the 5,000 of the test, which are sorted by subject: a first part of them would
be algebra alone. Prompts of more than 1,024 tokens, drawings for the most part, are left out: 7 for
training, 2 of the test. No score is recorded for this config yet.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"

    c.data.path = "DigitalLearningGmbH/MATH-lighteval"
    c.data.eval_split = "test"
    c.data.columns = ("prompt=problem", "answer=solution")
    c.data.prompt_template = (
        "{prompt}\nLet's think step by step and put the final answer within \\boxed{{}}."
    )
    c.data.chat = True
    c.data.max_prompt_tokens = 1024
    c.data.overlong = "drop"
    c.rewards.names = ("math_answer",)
    c.rewards.bad_rows = "drop"  # two solutions have an empty box

    c.batch.prompts = 64
    c.batch.group = 8
    c.batch.microbatch = 4
    c.rollout.max_tokens = 1024
    c.rollout.temperature = 1.0
    c.algorithm.kl_coef = 0.001
    c.optim.learning_rate = 1e-6
    c.loop.num_steps = 350

    c.evaluation.every_steps = 100
    c.evaluation.num_problems = 5000
    c.checkpoint.every_steps = 50
    return c
