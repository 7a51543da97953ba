"""Which tensors of a checkpoint hold a family's parameters, in a table that is read both ways.

A checkpoint may have a kernel transposed, several parameters in one tensor, row after row, or their
rows in another order, as rotary pairs that stand side by side. Each is undone in reading and done
again in writing. Parameters are stacked over layers, tensors are not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from grpo_jax.structs import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter stands, of one layer if it belongs to layers.

    `order[i]` is the place, among the rows that are the parameter's, of its own row i: a row of a
    transposed kernel is an output.
    """

    name: str  # "{layer}" stands for the layer's number
    transposed: bool = False  # [out, in] in the checkpoint, [in, out] here
    begin: int = 0  # the first row that is the parameter's
    order: tuple[int, ...] | None = None  # None: as they come

    def of_layer(self, layer: int) -> Tensor:
        return dataclasses.replace(self, name=self.name.format(layer=layer))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, up to the parameter's last row, from the parameter's."""
        rows, *rest = shape[::-1] if self.transposed else shape
        return (self.begin + rows, *rest)

    def read(self, tensor: Any, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        """The part of the parameter within bounds, of a tensor that indexing with slices reads."""
        (first, last), *rest = bounds[::-1] if self.transposed else bounds
        within = [slice(*b) for b in rest]
        if self.order is None:
            value = tensor[(slice(self.begin + first, self.begin + last), *within)]
        else:
            places = np.array(self.order[first:last])
            low, high = int(places.min()), int(places.max()) + 1
            value = tensor[(slice(self.begin + low, self.begin + high), *within)][places - low]
        return value.T if self.transposed else value

    def write(self, value: np.ndarray, tensor: np.ndarray) -> None:
        """Puts the whole parameter where it stands in the tensor: the inverse of `read`."""
        value = value.T if self.transposed else value
        places = slice(None) if self.order is None else np.array(self.order)
        tensor[self.begin : self.begin + len(value)][places] = value


def _llama(config: ModelConfig) -> dict[str, Tensor]:
    layer = "model.layers.{layer}."
    dense = {
        **{f"attention/{p}": f"{layer}self_attn.{p}_proj" for p in "qkvo"},
        **{f"mlp/{p}": f"{layer}mlp.{p}_proj" for p in ("gate", "up", "down")},
    }
    norms = {
        "attention_norm": f"{layer}input_layernorm",
        "mlp_norm": f"{layer}post_attention_layernorm",
        "attention/q_norm": f"{layer}self_attn.q_norm",
        "attention/k_norm": f"{layer}self_attn.k_norm",
        "norm": "model.norm",
    }
    return {
        "embed/embedding": Tensor("model.embed_tokens.weight"),
        "head/kernel": Tensor("lm_head.weight", transposed=True),
        **{f"{ours}/kernel": Tensor(f"{name}.weight", transposed=True)
           for ours, name in dense.items()},
        **{f"{ours}/bias": Tensor(f"{name}.bias") for ours, name in dense.items()},
        **{f"{ours}/scale": Tensor(f"{name}.weight") for ours, name in norms.items()},
    }  # fmt: skip


_NAMES = {"llama": _llama, "qwen2": _llama, "qwen3": _llama, "mistral": _llama}


def table(config: ModelConfig) -> dict[str, Tensor]:
    """By a parameter's path, within its layer if it has one, where its family keeps it.

    Parameters that the model does not have may be in it too.
    """
    return _NAMES[config.family](config)
