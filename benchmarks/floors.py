"""What the device at hand reaches with a plain product and a plain copy.

`grpo_jax/devices/roofline.py` turns these rates into the least time that a step can take. Each is
the best of several in the same run; products are larger where the device is no CPU.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp


def measured_flops(dtype: str, repeats: int = 20) -> float:
    """Operations per second of the fastest of some plain products."""
    best = 0.0
    sizes = [(512, 512, 512), (1024, 1024, 1024)]
    if jax.default_backend() != "cpu":
        sizes = [(4096, 4096, 4096), (8192, 8192, 8192)]
    for m, k, n in sizes:
        # Of random numbers: zeros and ones take less power, and a GPU is faster on them.
        a, b = (
            jax.random.normal(jax.random.key(i), x, dtype) for i, x in ((0, (m, k)), (1, (k, n)))
        )
        product = jax.jit(lambda a, b: a @ b)
        product(a, b).block_until_ready()
        for _ in range(repeats):
            began = time.perf_counter()
            product(a, b).block_until_ready()
            best = max(best, 2 * m * k * n / (time.perf_counter() - began))
    return best


def measured_bandwidth(megabytes: int = 0, repeats: int = 20) -> float:
    """Bytes per second of a copy, read and written ones; of far more than any cache holds."""
    megabytes = megabytes or (256 if jax.default_backend() == "cpu" else 2048)
    x = jax.random.normal(jax.random.key(0), (megabytes << 18,), jnp.float32)
    scale = jax.jit(lambda x: x * 1.5)
    scale(x).block_until_ready()
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        scale(x).block_until_ready()
        best = max(best, 2 * x.nbytes / (time.perf_counter() - began))
    return best
