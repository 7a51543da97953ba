"""Which kernels compute the attention of scoring and training, and decode."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from grpo_jax.kernels import gpu_cudnn, gpu_decode, pallas_triton, tpu_paged, tpu_splash
from grpo_jax.kernels.block_sums import Sums, sums_of_blocks
from grpo_jax.kernels.gpu_block_sums import SumsOfBlocks
from grpo_jax.kernels.gpu_decode import Streamed
from grpo_jax.kernels.gpu_norm import FusedNorm
from grpo_jax.kernels.kv_cache import Ring
from grpo_jax.kernels.tpu_paged import Paged
from grpo_jax.structs import ModelConfig


def choose(option: str, model: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """What `config.model.attention` names, with activations of `dtype`.

    "auto" takes cuDNN's kernel on GPUs where it can be had; see `tpu_splash.choose` too. Raises
    ValueError where what is named cannot be had.
    """
    obstacle = gpu_cudnn.obstacle(model, mesh, dtype)
    if option == "cudnn" and obstacle:
        raise ValueError(f'model.attention = "cudnn": {obstacle}. Set it to "auto" or "xla".')
    if option == "cudnn" or (option == "auto" and not obstacle):
        return gpu_cudnn.choose(model, mesh)
    return tpu_splash.choose(option, model, mesh)


def choose_decoding(option: str, cache: str, model: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """How `config.rollout.attention` keeps the cache and attends to it.

    `cache`: as `config.rollout.kv_cache_dtype`.

    "auto" takes the streamed kernel where it can be had. Raises ValueError where what is named
    cannot be had.
    """
    int8 = cache == "int8"
    obstacle = ""
    if option == "ragged":
        obstacle = tpu_paged.obstacle(cache, model, mesh)
    elif option != "xla":
        obstacle = gpu_decode.obstacle(model, mesh, dtype)
    if option == "xla" or (option == "auto" and obstacle):
        return Ring(int8)
    if obstacle:
        raise ValueError(f'rollout.attention = "{option}": {obstacle}. Set it to "auto" or "xla".')
    return Paged() if option == "ragged" else Streamed(int8)


def choose_norm(mesh: Mesh, dtype: Any) -> Any:
    """What norms the states of a token."""
    return nn.RMSNorm if pallas_triton.obstacle(mesh, dtype) else FusedNorm


def choose_sums(mesh: Mesh, dtype: Any) -> Sums:
    """How `logits.draw` finds the sums of blocks."""
    return sums_of_blocks if pallas_triton.obstacle(mesh, dtype) else SumsOfBlocks()
