"""Which kernels compute the attention of scoring and training, and decode."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from grpo_jax.models import (
    attention,
    cudnn,
    logits,
    norms,
    paged,
    peaks,
    splash,
    streamed,
    triton,
)
from grpo_jax.structs import ModelConfig


def choose(option: str, model: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """What `config.model.attention` names, with activations of `dtype`; see `splash.choose` too.

    "auto" takes cuDNN's kernel on GPUs where it can be had. Raises ValueError where what is named
    cannot be had.
    """
    obstacle = cudnn.obstacle(model, mesh, dtype)
    if option == "cudnn" and obstacle:
        raise ValueError(f'model.attention = "cudnn": {obstacle}. Set it to "auto" or "xla".')
    if option == "cudnn" or (option == "auto" and not obstacle):
        return cudnn.choose(model, mesh)
    return splash.choose(option, model, mesh)


def choose_decoding(option: str, cache: str, model: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """How `config.rollout.attention` keeps the cache, of `config.rollout.cache`, and attends to it.

    "auto" takes the streamed kernel where it can be had. Raises ValueError where what is named
    cannot be had.
    """
    int8 = cache == "int8"
    obstacle = ""
    if option == "ragged":
        obstacle = paged.obstacle(cache, model, mesh)
    elif option != "xla":
        obstacle = streamed.obstacle(model, mesh, dtype)
    if option == "xla" or (option == "auto" and obstacle):
        return attention.Ring(int8)
    if obstacle:
        raise ValueError(f'rollout.attention = "{option}": {obstacle}. Set it to "auto" or "xla".')
    return paged.Paged() if option == "ragged" else streamed.Streamed(int8)


def choose_norm(mesh: Mesh, dtype: Any) -> Any:
    """What norms the states of a token."""
    return nn.RMSNorm if triton.obstacle(mesh, dtype) else norms.FusedNorm


def choose_sums(mesh: Mesh, dtype: Any) -> logits.Sums:
    """How `logits.draw` finds the sums of blocks."""
    return logits.sums_of_blocks if triton.obstacle(mesh, dtype) else peaks.SumsOfBlocks()
