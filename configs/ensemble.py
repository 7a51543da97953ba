"""GRPO for answers that are helpful, safe and factual: three rewards in one ensemble.

    python -m pip install "grpo_jax[rewards]"
    python -m grpo_jax.train --config configs/ensemble.py --config.data.path=train.jsonl \\
        --config.data.eval_path=test.jsonl

Each line of the files is an object such as {"prompt": "...", "answer": "a reference"}. All members
work without a network: VADER's lexicon for a friendly tone, better-profanity's words for safety,
and the numbers and names in common with the reference for facts. They are stand-ins that anybody
can run: put a judge, a reward model ("model:FOLDER as helpful") or `toxicity` in their places. An
answer that is not safe gets -1, whatever else it is. docs/rewards.md has the other forms of
ensembles. The sizes fit a GPU of 80 GB. No score is recorded for this config yet.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    c.model.dtype = "bfloat16"
    c.data.path = "train.jsonl"
    c.data.chat = True
    c.data.max_prompt_tokens = 512
    c.rewards.names = (
        "sentiment as helpful",
        "clean_language as safe",
        "fact_overlap as factual",
        "ensemble:sum(of=['helpful', 'factual'], weights=[0.3, 1.0]) as good",
        "ensemble:gate(of='good', where='safe', at_least=1, otherwise=-1.0) as good_if_safe",
    )
    c.rewards.weights = (0.0, 0.0, 0.0, 0.0, 1.0)
    c.batch.prompts = 64
    c.batch.group = 8
    c.batch.microbatch = 4
    c.rollout.max_tokens = 512
    c.algorithm.kl_coef = 0.01
    c.optim.learning_rate = 1e-6
    c.loop.num_steps = 200
    c.evaluation.every_steps = 20
    c.checkpoint.every_steps = 20
    c.guards.members = "warn"  # a proxy that rises while another member falls
    return c
