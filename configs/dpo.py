"""A reasoner from preferences alone, on a laptop CPU in a few minutes, with no download.

    python -m grpo_jax.dpo --config configs/dpo.py --workdir runs/dpo

The quickstart's new model first imitates sloppy students, who mostly guess. It then answers 12 % of
512 held-out sums. From pairs of worked steps and what is worse, a guess or steps with an error, it
learns to work: 86 % with the seed 0. No answer is sampled while it learns.
`--config.preference.loss=kto` reads each pair as two labelled answers.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("quickstart", [])
    c.data.num_train = 9600  # each pair once
    c.evaluation.num_samples = 0

    c.preference.num_steps = 150
    c.preference.batch = 64
    c.preference.max_tokens = 40
    c.preference.learning_rate = 2e-4
    c.preference.warmup_steps = 10
    c.preference.evaluate_every_steps = 50
    c.preference.checkpoint_every_steps = 50
    return c
