"""grpo_jax from Python, in scripts and notebooks: `grpo_jax.train`, `grpo_jax.load`."""
