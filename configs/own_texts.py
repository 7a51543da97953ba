"""Retrieval-augmented RL on texts of your own, from a Hugging Face model, on one accelerator.

    python -m grpo_jax.train --config configs/own_texts.py --config.data.path=questions.jsonl \\
        --config.environment.classes="('grpo_jax.environments.tasks.corpus:Corpus(folder=\"texts\")',)"

The .txt and .md files of the folder are indexed at the start, and the model gets a tool that
searches them. Each line of questions.jsonl is an object such as {"prompt": "Who ...?", "answer":
"Ada"}. The model's chat template must show tools, as Qwen's does. No score is recorded for this
config yet.
"""

from grpo_jax import config


def get_config():
    c = config.default()
    c.model.path = "Qwen/Qwen2.5-1.5B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"
    c.data.path = "questions.jsonl"
    c.data.chat = True
    c.data.system_prompt = "Search the documents, then answer in a few words after ####."
    c.data.max_prompt_tokens = 768
    c.rewards.names = ("exact_answer",)
    c.rewards.weights = (1.0,)
    c.environment.classes = ("grpo_jax.environments.tasks.corpus:Corpus(folder='texts')",)
    c.environment.max_turns = 5
    c.environment.observation_tokens = 512
    c.batch.prompts = 32
    c.batch.group = 8
    c.batch.microbatch = 4
    c.rollout.max_tokens = 2048
    c.algorithm.kl_coef = 0.001
    c.optim.learning_rate = 1e-6
    c.loop.num_steps = 200
    c.evaluation.every_steps = 20
    c.checkpoint.every_steps = 20
    return c
