"""Programs are counted once, and not after the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.compiling import Compiling


def test_programs_are_counted_where_they_are_compiled():
    x = jnp.ones(3)
    with Compiling() as compiling:
        program = jax.jit(lambda x: jnp.sin(x) * 3.25)
        program(x)
        program(x)  # compiled already
        first = compiling.since_last()
        again = compiling.since_last()
    jax.jit(lambda x: jnp.cos(x) * 4.25)(x)
    assert first["programs"] == again["programs"] == compiling.programs == 1
    assert first["time/compile_s"] > 0 == again["time/compile_s"]
