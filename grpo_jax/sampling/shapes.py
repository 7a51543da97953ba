"""Shapes of the slots: how devices share them, and how many bytes decoding reads."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding

from grpo_jax.devices import sharding
from grpo_jax.models import lora
from grpo_jax.sampling import decode
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.publish import Publisher

_PROMPTS = 1024, 2048  # tokens: whole pages and blocks of any kernel's cache


def traffic(decoder: Decoder, publish: Publisher) -> dict[str, float]:
    """Bytes that decoding must read, for `roofline.rollout`; scales included."""
    model = decoder.model
    like = publish.like(lora.weight_shapes(model))
    read = [x for name, x in like.items() if name != "embed" or model.tied_head]
    # Two caches that differ only in the number of prompt tokens.
    few, many = (jax.eval_shape(lambda n=n: decode.empty(decoder, 1, 1, n)) for n in _PROMPTS)
    return {
        "weights": _num_bytes(read),
        "cache": (_num_bytes(many.cache) - _num_bytes(few.cache)) / (_PROMPTS[1] - _PROMPTS[0]),
        "weight_shards": decoder.mesh.shape["tensor"],
    }


def slot_shardings(decoder: Decoder, like: decode.Slots) -> decode.Slots:
    """Shardings of slots; caches are split inside a shard by head, or by slot."""
    rows, heads = ("slots", "kv_heads") if decoder.parts == 1 else ("attention_slots", None)

    def place(axes: tuple[str | None, ...], tree):
        def one(x: jax.ShapeDtypeStruct) -> NamedSharding:
            names = axes + (None,) * (x.ndim - len(axes))
            return sharding.sharding_of(decoder.mesh, names, x.shape)

        return jax.tree.map(one, tree)

    by_slot = place(("slots",), like.replace(cache=()))
    return by_slot.replace(cache=place((rows, heads), like.cache))


def _num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
