"""Tools for `tool_peers.py`; processes of environments import this file, without JAX."""

from __future__ import annotations

import time

from grpo_jax.environments.tasks.calculator import multiply


def multiply_slowly(a: int, b: int) -> int:
    """Multiplies two whole numbers, and takes its time.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        The product.
    """
    time.sleep(0.1)
    return multiply(a, b)
