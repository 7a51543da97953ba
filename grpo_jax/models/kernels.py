"""Which kernels compute the attention of scoring and training."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from grpo_jax.models import cudnn, splash
from grpo_jax.structs import ModelConfig


def choose(option: str, model: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """What `config.model.attention` names, with activations of `dtype`; see `splash.choose`.

    Raises ValueError where it cannot be had.
    """
    if option == "cudnn":
        return cudnn.choose(model, mesh, dtype)
    return splash.choose(option, model, mesh)
