"""Chooses the kernels of scoring, training and decoding that the mesh's devices can run."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from grpo_jax.kernels import (
    gpu_cudnn,
    gpu_decode,
    pallas_triton,
    row_blocks,
    tpu_paged,
    tpu_splash,
)
from grpo_jax.kernels.attention import AttentionKernels
from grpo_jax.kernels.block_sums import Sums, sums_of_blocks
from grpo_jax.kernels.gpu_block_sums import TritonBlockSums
from grpo_jax.kernels.gpu_codes import FewRows
from grpo_jax.kernels.gpu_decode import TritonDecode
from grpo_jax.kernels.gpu_norm import FusedNorm
from grpo_jax.kernels.kv_cache import KVCache, RingCache
from grpo_jax.kernels.norm import AddNorm
from grpo_jax.kernels.quantize import FrozenProduct, frozen_product
from grpo_jax.kernels.row_blocks import RowBlocks
from grpo_jax.kernels.tpu_paged import RaggedPagedDecode
from grpo_jax.structs import ModelConfig


def choose(
    option: str, model: ModelConfig, mesh: Mesh, dtype: Any, *, in_parts: bool = False
) -> AttentionKernels:
    """The kernels that `config.model.attention` names, for activations of `dtype`.

    "auto" takes cuDNN's kernel on GPUs where it is available. It does not yet for models with
    windows, whose results were not compared on a GPU. On CPUs it takes `RowBlocks`. See
    `tpu_splash.choose` too. `in_parts`: completions may have several (`Rollouts.begin_PGC`), which
    cuDNN's kernel cannot tell apart. Raises ValueError if the named kernel cannot be used.
    """
    reason = gpu_cudnn.why_unavailable(model, mesh, dtype)
    if in_parts and not reason:
        reason = 'it takes a completion as one text, and environment.history = "fork" makes several'
    if option == "cudnn" and reason:
        raise ValueError(f'model.attention = "cudnn": {reason}. Set it to "auto" or "xla".')
    if option == "cudnn" or (option == "auto" and not (reason or model.has_windows)):
        return gpu_cudnn.choose(model, mesh)
    if option == "auto" and row_blocks.fits(mesh):
        return RowBlocks()
    return tpu_splash.choose(option, model, mesh)


def choose_decoding(option: str, cache: str, model: ModelConfig, mesh: Mesh, dtype: Any) -> KVCache:
    """The KV cache, and so the kernel, that `config.rollout.attention` names.

    `cache` is `config.rollout.kv_cache_dtype`.

    "auto" takes the Triton kernel where it is available. Raises ValueError if the named kernel
    cannot be used.
    """
    int8 = cache == "int8"
    reason = ""
    if option == "ragged":
        reason = tpu_paged.why_unavailable(cache, model, mesh)
    elif option != "xla":
        reason = gpu_decode.why_unavailable(model, mesh, dtype)
    if option == "xla" or (option == "auto" and reason):
        return RingCache(int8)
    if reason:
        raise ValueError(f'rollout.attention = "{option}": {reason}. Set it to "auto" or "xla".')
    return RaggedPagedDecode() if option == "ragged" else TritonDecode(int8)


def choose_norm(mesh: Mesh, dtype: Any) -> type[nn.Module]:
    """The module that sums a decode step's residual stream and normalizes the sum."""
    return AddNorm if pallas_triton.why_unavailable(mesh, dtype) else FusedNorm


def choose_sums(mesh: Mesh, dtype: Any) -> Sums:
    """The function by which `logits.sample` computes the sums of blocks."""
    return sums_of_blocks if pallas_triton.why_unavailable(mesh, dtype) else TritonBlockSums()


def choose_frozen_product(mesh: Mesh, dtype: Any) -> FrozenProduct:
    """The function by which decoding multiplies with kernels in codes."""
    return frozen_product if pallas_triton.why_unavailable(mesh, dtype) else FewRows()
