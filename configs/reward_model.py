"""A reward model of worked steps, on a laptop CPU in a few minutes, with no download.

    python -m grpo_jax.reward_model --config configs/reward_model.py --workdir runs/reward_model

The quickstart's new model first imitates sloppy students. With a new head it then learns from pairs
which of two answers is better: worked steps, rather than a guess or steps with an error. It prefers
the better one in 83 % of held-out pairs: it knows a guess, and not yet a wrong step.
`runs/reward_model/calibration.png` shows how well its probabilities hold on held-out pairs.
"""

from grpo_jax.config import loading


def get_config():
    c = loading.read("quickstart", [])

    c.reward_model.num_steps = 200
    c.reward_model.batch = 64
    c.reward_model.max_tokens = 40
    c.reward_model.learning_rate = 5e-4
    c.reward_model.warmup_steps = 10
    c.reward_model.centre_coef = 0.01
    c.reward_model.evaluate_every_steps = 50
    c.reward_model.checkpoint_every_steps = 50
    return c
