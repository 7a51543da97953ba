"""TRL's names for this trainer: `from grpo_jax.trl import GRPOConfig, GRPOTrainer`.

Each argument does what it does in TRL 1.16, or is refused with a message that names the
replacement.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """The two classes, imported on first use: the trainer takes seconds to import."""
    if name == "GRPOConfig":
        return importlib.import_module("grpo_jax.trl.config").GRPOConfig
    if name == "GRPOTrainer":
        return importlib.import_module("grpo_jax.trl.trainer").GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
