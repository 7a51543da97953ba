"""A reasoner from preferences alone, on a laptop CPU in a few minutes, with no download.

    python -m grpo_jax.dpo --config configs/dpo.py --workdir runs/dpo

The quickstart's new model first imitates sloppy students, who mostly guess. It then learns from
pairs of worked steps and what is worse: a guess, or steps with an error. No answer is sampled.
`--config.preference.loss=kto` reads each pair as two labelled answers.
"""

import importlib.util
from pathlib import Path


def get_config():
    path = Path(__file__).with_name("quickstart.py")
    spec = importlib.util.spec_from_file_location("quickstart", path)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    c = quickstart.get_config()
    c.evaluation.num_samples = 0

    c.preference.num_steps = 150
    c.preference.batch = 64
    c.preference.max_tokens = 40
    c.preference.learning_rate = 2e-4
    c.preference.warmup_steps = 10
    c.preference.evaluate_every_steps = 50
    c.preference.checkpoint_every_steps = 50
    return c
