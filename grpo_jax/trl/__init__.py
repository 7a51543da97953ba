"""TRL's names for these trainers: `from grpo_jax.trl import GRPOConfig, GRPOTrainer`.

The others are SFT, DPO, KTO, ORPO, CPO and Reward, each with `Config` and `Trainer`.

Each argument does what it does in TRL 1.16, or is refused with a message that names the
replacement.
"""

import importlib
from typing import Any

_WHERE = {
    "GRPOConfig": "config",
    "GRPOTrainer": "trainer",
}
for _name in ("SFT", "DPO", "KTO", "ORPO", "CPO", "Reward"):
    _WHERE |= {f"{_name}Config": "given_config", f"{_name}Trainer": "given_trainer"}


def __getattr__(name: str) -> Any:
    """A class, imported on first use: trainers take seconds to import."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"grpo_jax.trl.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
