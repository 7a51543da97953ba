"""The least time that a step's arithmetic and memory traffic can take on the device at hand.

Rates are measured in the same run: the best of several plain products, and of several copies. A
product of [4096, 256] by [256, 688] tells what a small model can reach; larger devices get larger
ones. Counted are matrix products alone: the body on every token, the head on completion tokens.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.structs import ModelConfig


def measured_flops(dtype: str, repeats: int = 20) -> float:
    """Operations per second of the fastest of some plain products."""
    best = 0.0
    sizes = [(512, 512, 512), (1024, 1024, 1024)]
    if jax.default_backend() != "cpu":
        sizes = [(4096, 4096, 4096), (8192, 8192, 8192)]
    for m, k, n in sizes:
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        product = jax.jit(lambda a, b: a @ b)
        product(a, b).block_until_ready()
        for _ in range(repeats):
            began = time.perf_counter()
            product(a, b).block_until_ready()
            best = max(best, 2 * m * k * n / (time.perf_counter() - began))
    return best


def measured_bandwidth(megabytes: int = 256, repeats: int = 20) -> float:
    """Bytes per second of a copy, read and written ones."""
    x = jnp.ones(megabytes << 18, jnp.float32)
    scale = jax.jit(lambda x: x * 1.5)
    scale(x).block_until_ready()
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        scale(x).block_until_ready()
        best = max(best, 2 * x.nbytes / (time.perf_counter() - began))
    return best


def _body(model: ModelConfig) -> int:
    """Weights that every token is multiplied with."""
    head = model.vocab_size * model.width * (1 if model.tied_head else 2)
    return model.num_params - head


def _attention(model: ModelConfig, pairs: float) -> float:
    return 4.0 * model.num_layers * model.num_heads * model.head_size * pairs


def forward_flops(model: ModelConfig, prompts: int, prompt_tokens: int, length_PG) -> float:
    """Operations of one pass over prompts, each once, and their completions."""
    length = np.asarray(length_PG, np.float64)
    tokens = prompts * prompt_tokens + length.sum()
    pairs = prompts * prompt_tokens**2 / 2 + (length * prompt_tokens + length**2 / 2).sum()
    head = 2.0 * model.vocab_size * model.width * length.sum()
    return 2.0 * _body(model) * tokens + _attention(model, pairs) + head


def decode_bytes(model: ModelConfig, prompt_tokens: int, length_PG, itemsize: int) -> float:
    """Bytes that decoding reads: weights once a token position, prompts' caches once a group."""
    length = np.asarray(length_PG, np.float64)
    weights = (_body(model) + model.vocab_size * model.width) * itemsize
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_size * itemsize
    own = cache * (length**2 / 2).sum()
    prefix = cache * prompt_tokens * length.max(axis=1).sum()
    logits = 3 * 4.0 * model.vocab_size * length.sum()
    return weights * length.max() + own + prefix + logits


def seconds(flops: float, num_bytes: float, rate: float, bandwidth: float) -> float:
    """The floor: arithmetic or traffic, whichever takes longer."""
    return max(flops / rate, num_bytes / bandwidth)
