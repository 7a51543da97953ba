"""Train states of a tiny model, and their comparison bit for bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.learner import accumulate, optim
from grpo_jax.learner import train_state as train_state_lib
from grpo_jax.models import parameters
from grpo_jax.structs import Layer, ModelConfig, Rotary

MODEL = ModelConfig(
    family="qwen2", vocab_size=8, width=16, mlp_width=24, layers=(Layer(),),
    num_heads=2, num_kv_heads=1, head_size=8, rotaries=(Rotary(1e4),), norm_eps=1e-6,
    max_position=32, tied_head=True,
)  # fmt: skip
OPTIMIZER = optim.adamw(
    lambda step: 0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
)


@functools.lru_cache(maxsize=8)
def train_state(mesh, updates: int, model=MODEL, seed=0):
    """A state after some updates with random gradients; nothing may be donated of it."""
    params = _init(model)(jax.random.key(seed))
    state = train_state_lib.start(params, model, mesh, OPTIMIZER)
    for step in range(updates):
        placed = jax.tree.map(lambda x: x.sharding, state)
        state = jax.device_put(_updated(state, step), placed)
    return state


@functools.cache
def _init(model):
    return jax.jit(functools.partial(parameters.init, model))


@jax.jit
def _updated(state, step):
    key = jax.random.key(step)
    grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), state.params)
    return accumulate.apply_gradient(state, OPTIMIZER, grads, jnp.float32(0))[0]


def same_bits(a, b):
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b) and left
    for x, y in zip(left, right):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
