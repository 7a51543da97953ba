"""grpo_jax: train reasoning language models by Group Relative Policy Optimization, in JAX."""

__version__ = "0.1.0"
