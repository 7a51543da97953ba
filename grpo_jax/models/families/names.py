"""The tensors of a checkpoint that hold a family's parameters; a table used in both directions."""

from __future__ import annotations

import dataclasses

import numpy as np

from grpo_jax.models.hf.tensor import Tensor
from grpo_jax.structs import ModelConfig

# Differences from Llama: the names of norms, tensors that hold several parameters, rotary pairs
# that are adjacent in a head.
_GEMMA = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_NORMS = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _GEMMA,
    "olmo3": _GEMMA,
    "glm4": {
        "attention_post_norm": "post_self_attn_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
    },
}
_FUSED = {"phi3": ("qkv_proj", "gate_up_proj"), "glm4": ("gate_up_proj",)}
_SIDE_BY_SIDE = ("glm4",)

# Tensors of an image-text model outside of its decoder: exported unchanged.
SET_ASIDE = ("vision_tower.", "multi_modal_projector.")


def prefix(config: ModelConfig) -> str:
    """The prefix of the decoder's tensor names."""
    return "language_model." if config.wrapper else ""


def spelled(name: str, config: ModelConfig) -> str:
    """A tensor's name in the usual spelling of its family's files, from any spelling.

    For image-text models, transformers' names in memory differ from those in files.
    """
    if not config.wrapper:
        return name
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return name.removeprefix("model.")


def table(config: ModelConfig) -> dict[str, Tensor]:
    """The tensor of each parameter, by the parameter's path, which is relative to its layer if any.

    It may include parameters that the model does not have.
    """
    model = f"{prefix(config)}model."
    layer = f"{model}layers.{{layer}}."
    fused = _FUSED.get(config.family, ())
    sizes = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    dense, begin = {}, 0
    for part, heads in sizes.items():
        name = f"{layer}self_attn.{'qkv' if 'qkv_proj' in fused else part}_proj"
        order = None if part == "v" else _order(config, heads)
        dense[f"attention/{part}"] = Tensor(name, begin=begin, order=order)
        begin += heads * config.head_size if "qkv_proj" in fused else 0
    dense["attention/o"] = Tensor(f"{layer}self_attn.o_proj")
    for i, part in enumerate(("gate", "up")):
        together = "gate_up_proj" in fused
        name = f"{layer}mlp.{'gate_up' if together else part}_proj"
        dense[f"mlp/{part}"] = Tensor(name, begin=i * config.mlp_width * together)
    dense["mlp/down"] = Tensor(f"{layer}mlp.down_proj")
    norms = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **_NORMS.get(config.family, {}),
        "attention/q_norm": "self_attn.q_norm",
        "attention/k_norm": "self_attn.k_norm",
    }
    of = dataclasses.replace
    return {
        "embed/embedding": Tensor(f"{model}embed_tokens.weight"),
        "head/kernel": Tensor(f"{prefix(config)}lm_head.weight", transposed=True),
        "score/kernel": Tensor("score.weight", transposed=True),
        "norm/scale": Tensor(f"{model}norm.weight"),
        **{f"{k}/kernel": of(t, name=f"{t.name}.weight", transposed=True)
           for k, t in dense.items()},
        **{f"{k}/bias": of(t, name=f"{t.name}.bias") for k, t in dense.items()},
        **{f"{k}/scale": Tensor(f"{layer}{name}.weight") for k, name in norms.items()},
    }  # fmt: skip


def _order(config: ModelConfig, heads: int) -> tuple[int, ...] | None:
    """The places of our query or key rows in the file's tensor; None: the same order.

    Here dimension i of a head is rotated with i + H / 2. In the file, a partial rotary pairs the
    halves of the rotated part; adjacent pairs are 2 * i and 2 * i + 1.
    """
    size, share = config.head_size, config.rotaries[0].share
    side_by_side = config.family in _SIDE_BY_SIDE
    turning = size if config.rotaries[0].proportional else int(size * share)
    if turning == size and not side_by_side:
        return None
    turned = np.arange(turning)
    turned = turned.reshape(-1, 2).T if side_by_side else turned.reshape(2, -1)
    passed = np.arange(turning, size).reshape(2, -1)
    of_head = np.concatenate([turned, passed], axis=1).reshape(-1)
    rows = np.arange(heads)[:, None] * size + of_head[None]
    return tuple(int(row) for row in rows.reshape(-1))
