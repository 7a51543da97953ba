"""`grpo_jax.load_reward_model`: a reward model for scoring from Python."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from grpo_jax.devices import sharding
from grpo_jax.setup import reward_models
from grpo_jax.setup.reward_models import RewardModel


def load_reward_model(
    path: str | Path, *, dtype: str = "float32", date: datetime | None = None
) -> RewardModel:
    """The reward model of a Hugging Face folder or hub id, on all devices.

        grpo_jax.load_reward_model("runs/rm/export").score(["1+2="], ["3", "4"], group=2)

    `score(prompts, texts, group)` returns float32 [B] for B texts, `group` of them for each prompt,
    which is a text or messages. `date`: that chat templates are told; None: now. Raises ValueError
    if there is none, or a model without a score.
    """
    mesh = sharding.make_mesh()
    return reward_models.load(str(path), mesh, dtype, date or datetime.now(), option="path")
