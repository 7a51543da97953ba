"""Random models as Hugging Face folders, for the tests that read and write them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import transformers

from grpo_jax.devices import sharding
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.hf.weights import load_params

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CASES = {
    "llama": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 4}),
}
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def save_random_model(folder: Path, kind: str, settings: dict, dtype=torch.float32, **kwargs):
    """Writes a transformers model whose every parameter is random, and returns its tensors."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder, **kwargs)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def load(folder: Path, dtype=jnp.float32, **mesh):
    config = read_config(folder)
    return config, load_params(folder, config, sharding.make_mesh(**mesh), dtype)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    files = folder.glob("*.safetensors")
    return {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}


def rewrite(folder: Path, change) -> None:
    """Rewrites the checkpoint's tensors after `change` has edited their dict."""
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_trees_equal(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
