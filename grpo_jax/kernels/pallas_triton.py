"""What kernels in Pallas for Triton share: where they can be used, and how they are built."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.devices import sharding


def why_unavailable(mesh: Mesh, dtype: Any) -> str:
    """Why no kernel can be used for activations of `dtype`, or ""."""
    if not sharding.is_gpu(mesh):
        return f"it is for NVIDIA GPUs, and the devices are {mesh.devices.flat[0].platform}s"
    if mesh.shape["tensor"] > 1:
        return (
            f"mesh.tensor = {mesh.shape['tensor']} splits the heads, which XLA does with no kernel"
        )
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it takes bfloat16, and model.dtype is {jnp.dtype(dtype)}"
    try:
        module()
    except ImportError:
        return f"JAX {jax.__version__} has no Pallas for Triton"
    return ""


def module() -> Any:
    """The module of JAX in which kernels are written."""
    with warnings.catch_warnings():  # deprecated, and what there is
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton
    return triton


def options(interpret: bool, **params: int) -> dict[str, Any]:
    """`pallas_call`'s arguments with Triton's parameters; `interpret`: any device, for tests."""
    if interpret:
        return {"interpret": True}
    return {"compiler_params": module().CompilerParams(**params)}
