"""Weights as sampling reads them."""

from __future__ import annotations

import jax

from grpo_jax.models import parameters
from grpo_jax.structs import ModelConfig, Params


def axes_in_decoding(model: ModelConfig, parts: int) -> Params:
    """Logical axes of the decode weights, layer by layer: not sharded over fsdp.

    Attention is replicated too where it is split by row, in `parts`, and not by head.
    """
    whole = ("embed", "heads", "kv_heads") if parts > 1 else ("embed",)
    layers = [parameters.layer_axes(model, layer) for layer in model.layers]
    return jax.tree.map(
        lambda names: tuple(None if n in whole else n for n in names),
        parameters.logical_axes(model) | {"layers": layers},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def is_like(part: Params, like: Params) -> bool:
    """Whether the arrays have these dtypes and lie so."""
    if jax.tree.structure(part) != jax.tree.structure(like):
        return False
    return all(
        x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(like))
    )
