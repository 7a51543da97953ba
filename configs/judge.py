"""GRPO from an LLM judge beside a rule, on GSM8K: the quickest way to AI feedback.

    export JUDGE_BASE_URL=http://localhost:8000/v1 JUDGE_MODEL=Qwen/Qwen2.5-7B-Instruct
    python -m grpo_jax.train --config configs/judge.py

Any OpenAI-compatible server will do; JUDGE_API_KEY holds its key, if it wants one. The rule decides
what is right, and the judge which of the right answers explains best. One GPU of 80 GB for the
policy; the judge runs elsewhere. A step has 512 judgements, so a run 179,200. No score is recorded
for this config yet.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("gsm8k", [])
    c.rewards.names = ("math_answer", "judge:helpful")
    c.rewards.weights = (1.0, 0.3)
    c.rewards.accuracy = "math_answer"
    c.rewards.max_failed_share = 0.3  # of a step; more is an outage, and ends the run
    c.judge.concurrency = 64
    c.judge.max_tokens = 300_000_000  # of the run, about 1,700 a judgement
    return c
