"""Every option of a run: default, range and meaning; their rules; what a run records of them."""

from grpo_jax.config.options import default as default
