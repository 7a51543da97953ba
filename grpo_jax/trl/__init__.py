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


# Trainers of TRL's that have no class here, and what trains so.
_BY_OPTIONS = {
    "RLOO": "grpo_jax.train(..., preset='rloo')",
    "PPO": "grpo_jax.train(..., preset='ppo'): docs/ppo.md",
    "GMPO": "grpo_jax.train(..., preset='gmpo')",
    "Distillation": "grpo_jax.train(..., teacher='DIR'): docs/distillation.md",
    "GKD": "grpo_jax.train(..., teacher='DIR'): docs/distillation.md",
}


def __getattr__(name: str) -> Any:
    """A class, imported on first use: trainers take seconds to import."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"grpo_jax.trl.{_WHERE[name]}"), name)
    kind = name.removesuffix("Trainer").removesuffix("Config")
    if kind != name:  # an ImportError, since Python hides the text of another from `import`
        use = f" Use {_BY_OPTIONS[kind]}." if kind in _BY_OPTIONS else ""
        raise ImportError(f"grpo_jax.trl has no {name}.{use} It has {', '.join(sorted(_WHERE))}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
