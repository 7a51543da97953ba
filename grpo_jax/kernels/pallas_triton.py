"""Common parts of the Pallas kernels for Triton: availability, and options of `pallas_call`."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.devices import sharding


def why_unavailable(mesh: Mesh, dtype: Any) -> str:
    """The reason why these kernels cannot be used for activations of `dtype`; "" if they can."""
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
    """JAX's module with Triton's operations for Pallas."""
    with warnings.catch_warnings():  # deprecated, but there is no other
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton
    return triton


def options(interpret: bool, **params: int) -> dict[str, Any]:
    """Arguments of `pallas_call` with Triton's parameters; `interpret` runs on any device."""
    if interpret:
        return {"interpret": True}
    return {"compiler_params": module().CompilerParams(**params)}
