"""The train state: its creation, its shardings, and skipped updates."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax.devices import sharding
from grpo_jax.devices.compiling import Call
from grpo_jax.models import lora
from grpo_jax.structs import ModelConfig, Params, TrainState


def refuse(state: TrainState, number: int) -> TrainState:
    """The state after `number` refused updates: only its counters change."""
    moved = [
        jax.device_put(np.int32(int(count) + number), count.sharding)
        for count in (state.num_updates, state.num_skipped)
    ]
    return state.replace(num_updates=moved[0], num_skipped=moved[1])


def param_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """Shardings of the trained parameters."""
    return sharding.tree_shardings(mesh, lora.trained_axes(model), lora.trained_shapes(model))


def zero1_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """Shardings of moments and summed gradients: as parameters, and also split over data shards."""
    return jax.tree.map(
        lambda x, placed: sharding.zero1_sharding(mesh, placed, x.shape),
        lora.trained_shapes(model),
        param_shardings(model, mesh),
    )


def _state_shardings(like: TrainState, model: ModelConfig, mesh: Mesh, optimizer) -> TrainState:
    """Shardings of the whole state."""
    whole = sharding.replicated(mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        # A moment may be several arrays with the parameter's axes, some of them shorter.
        lambda kept, placed: jax.tree.map(
            lambda x: sharding.like_parameter(mesh, placed, x.shape), kept
        ),
        like.opt_state,
        zero1_shardings(model, mesh),
        transform_non_params=lambda _: whole,
        is_leaf=lambda x: not isinstance(x, dict),
    )
    return TrainState(param_shardings(model, mesh), opt_state, whole, whole)


def state_like(
    model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation, dtype=jnp.float32
) -> TrainState:
    """Shapes, dtypes and shardings of the train state, with parameters of `dtype`; no arrays."""
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), lora.trained_shapes(model)
    )
    like = jax.eval_shape(functools.partial(_init_state, optimizer=optimizer), params)
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        like,
        _state_shardings(like, model, mesh, optimizer),
    )


def start(
    params: Params, model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first update; donates `params`."""
    return starting(params, model, mesh, optimizer)()


def starting(
    params: Params, model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> Call:
    """The program of `start`."""
    shardings = jax.tree.map(lambda x: x.sharding, state_like(model, mesh, optimizer))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def init_state(params: Params) -> TrainState:
        return _init_state(params, optimizer)

    return Call(init_state, (params,))


def _init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
