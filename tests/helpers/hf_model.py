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


def in_nf4(folder: Path, *, double: bool = True) -> dict[str, np.ndarray]:
    """Makes the layers' kernels of a folder random codes in bitsandbytes' form; their values."""
    draw, values, tensors = np.random.default_rng(0), {}, tensors_of(folder)
    levels = np.float32([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ])  # fmt: skip
    for name in [n for n, x in tensors.items() if ".layers." in n and x.ndim == 2]:
        shape = tensors[name].shape
        number = int(np.prod(shape))
        codes = draw.integers(0, 16, number).astype(np.uint8)
        packed = np.pad(codes, (0, number % 2)).reshape(-1, 2)
        scale = draw.uniform(0.05, 0.3, -(-number // 64)).astype(np.float32)
        says = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": shape}
        parts = {"": (packed[:, :1] << 4) + packed[:, 1:], ".quant_map": levels}
        if double:
            of_scale = np.sort(draw.uniform(-1, 1, 256)).astype(np.float32)
            in_8 = draw.integers(0, 256, len(scale)).astype(np.uint8)
            largest = draw.uniform(0.1, 0.2, -(-len(scale) // 256)).astype(np.float32)
            scale = of_scale[in_8] * np.repeat(largest, 256)[: len(scale)] + np.float32(0.25)
            parts |= {".absmax": in_8, ".nested_absmax": largest, ".nested_quant_map": of_scale}
            says |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        else:
            parts[".absmax"] = scale
        values[name] = (levels[codes] * np.repeat(scale, 64)[:number]).reshape(shape)
        text = np.frombuffer(json.dumps(says).encode(), np.uint8)
        parts[".quant_state.bitsandbytes__nf4"] = text
        tensors |= {name + part: np.ascontiguousarray(x) for part, x in parts.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double,
        },
    )
    return values
